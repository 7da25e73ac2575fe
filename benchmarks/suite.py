"""What the benchmarks of all ops share: a case, its providers, a row of figures, and the ratios that goals are stated in.

A `Case` is one call of an op: shapes, which tensors are one and the same, which need a gradient. A `Suite` is an op with the
implementations that it is compared with. Everything that is compared runs interleaved in one process (measure.interleave).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contract_gate, machine, measure, results
from kdops.dispatch import SPECS, in_taps

Function = Callable[..., Tensor]
OURS = "kdops."
MOST = {"cpu": 8 * 2**30, "cuda": 100 * 2**30}  # bytes that a provider may take


@dataclass
class Chosen:
    """What the command line asked for (conftest.py)."""

    device: str | None = None
    """Only cases on this kind of device; None takes all that this machine has."""
    without: tuple[str, ...] = ()
    """Providers to leave out: autotuning takes minutes a case."""


CHOSEN = Chosen()

torch._dynamo.config.recompile_limit = 256  # one for every case: compile must not fall back to eager


@dataclass(frozen=True)
class Case:
    """One call of an op, forward or forward and backward.

    `shapes` are those of the distinct tensors, `arguments` says which of them each argument is (none twice, unless given), `trained`
    which need a gradient; with `taps`, every so many arguments are passed as one list. `held` is what eager torch holds at its peak, in
    bytes, where that matters; `exact` whether a float64 truth is affordable.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[int, ...]
    arguments: tuple[int, ...] = ()
    taps: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounds: int = 15
    held: int = 0
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}{'' if self.device == 'cpu' else f', {self.precision}'}"

    @property
    def shape(self) -> str:
        sizes = " ".join(dict.fromkeys("x".join(map(str, shape)) for shape in self.shapes))
        return sizes + "".join(f", {key}={value}" for key, value in self.options)

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        return "forward+backward" if self.trained else "forward"

    def inputs(self) -> list[Tensor]:
        """The arguments; the same values in every process."""
        generator = torch.Generator(self.device).manual_seed(0)
        drawn = [torch.randn(shape, generator=generator, device=self.device).to(self.dtype) for shape in self.shapes]
        for index in self.trained:
            drawn[index].requires_grad_()
        return [drawn[index] for index in self.arguments or range(len(drawn))]

    def step(self, function: Function, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Forward and backward through `function`, returning the results and the gradients that are asked for."""
        wanted = list({id(t): t for t in inputs if t.requires_grad}.values())
        arguments, options = in_taps(inputs, self.taps), dict(self.options)
        upstream: list[Tensor] = []

        def run() -> list[Tensor]:
            out = function(*arguments, **options)
            outs = [out] if isinstance(out, Tensor) else list(out)
            if not wanted:
                return outs
            if not upstream:
                generator = torch.Generator(self.device).manual_seed(1)
                upstream.extend(torch.randn(o.shape, generator=generator, device=self.device).to(o) for o in outs)
            # The upstream gradient takes the result's dtype: a provider may compute in a wider one.
            grads = torch.autograd.grad(outs, wanted, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)])
            return [*(o.detach() for o in outs), *grads]

        return run


@dataclass(frozen=True)
class Provider:
    """An implementation: what runs, `refusal(case)`, the reason why it cannot (None: it can), and the only device that it is made for."""

    function: Function
    refusal: Callable[[Case], str | None] = field(default=lambda case: None)
    device: str | None = None


def bounded(function: Function) -> Provider:
    """A provider that holds what eager torch holds: refused where that is too much."""

    def refusal(case: Case) -> str | None:
        if case.held <= MOST[case.device]:
            return None
        return f"it would hold {case.held / 2**30:.0f} GiB, above the {MOST[case.device] / 2**30:.0f} GiB allowed here"

    return Provider(function, refusal)


def library(name: str, build: Callable[[], Provider]) -> Provider:
    """A provider out of a library; where that is not installed, its row says so. Libraries are compared on GPUs."""
    if find_spec(name) is not None:
        return dataclasses.replace(build(), device="cuda")

    def function(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(f"{name} is not installed")

    return Provider(function, lambda case: f"{name} is not installed", "cuda")


def eager_and_compiled(eager: Function) -> dict[str, Provider]:
    """The reference in plain torch, as it is and through torch.compile, whose autotuning tries every product that it has."""
    return {
        "eager": bounded(eager),
        "compile": bounded(torch.compile(eager, dynamic=False)),
        "max-autotune": bounded(torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")),
    }


class Suite:
    """An op, its cases, and all that it is compared with. Its FLOPs are done by the `unit` "matrix" or "vector" (machine.Peaks)."""

    def __init__(self, op: str, cases: Sequence[Case], baselines: dict[str, Provider], unit: str = "matrix") -> None:
        self.spec = SPECS[op]
        self.cases = [
            case
            for case in cases
            if (case.device == "cpu" or torch.cuda.is_available()) and CHOSEN.device in (None, case.device)
        ]
        self.unit = unit
        self.baselines = {name: provider for name, provider in baselines.items() if name not in CHOSEN.without}
        self.eager = baselines["eager"].function
        self.failures: dict[tuple[Case, str], str] = {}
        ours = {OURS + b.name: self._ours(b.name) for b in self.spec.backends if b.name != "reference"}
        self.providers = {**ours, **self.baselines}

    def _ours(self, backend: str) -> Provider:
        def function(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = self.spec.function(*args, **kwargs, backend=backend)
            return out

        # Not Triton's interpreter, which is made for tests.
        device = "cpu" if backend == "cpu" else "cuda"
        return Provider(function, lambda case: self.spec.backend(backend).supports(case.inputs()), device)

    def names(self, device: str) -> list[str]:
        """The providers that are made for a device."""
        return [name for name, provider in self.providers.items() if provider.device in (None, device)]

    def rows(self) -> list[tuple[Case, str]]:
        """Every row of the table: a case and a provider."""
        return [(case, provider) for case in self.cases for provider in self.names(case.device)]

    @cache  # noqa: B019 (a suite lives as long as the process)
    def timings(self, case: Case) -> dict[str, measure.Timing]:
        """Of every provider that can run the case, interleaved."""
        return self.compare(case, [n for n in self.names(case.device) if self.providers[n].refusal(case) is None])

    def compare(self, case: Case, providers: Sequence[str]) -> dict[str, measure.Timing]:
        """Of some providers, interleaved; those that fail are kept with the reason in `failures`."""
        inputs = case.inputs()
        calls = {}
        for name in providers:
            call = case.step(self.providers[name].function, inputs)
            try:
                measure.synchronised(call, case.device)()
            except Exception as error:  # whatever a library raises: the others are measured all the same
                self.failures[case, name] = (
                    f"it failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
                )
            else:
                calls[name] = call
        return measure.interleave(calls, case.rounds, case.device)

    @cache  # noqa: B019
    def truth(self, case: Case) -> list[Tensor]:
        """Results and gradients of the reference in float64, with tensors that have two roles still shared."""
        inputs = case.inputs()
        wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in inputs}
        return case.step(self.eager, [wide[id(t)] for t in inputs])()

    def row(self, benchmark: Any, case: Case, provider: str, store: bool) -> None:
        """Measure one row; with `store`, keep it in benchmarks/results: the figures, or why there are none."""
        reason = self.providers[provider].refusal(case)
        if reason is None and provider not in self.timings(case):
            reason = self.failures[case, provider]
            if provider.startswith(OURS):
                self._store(case, provider, {"refused": reason}, store)
                pytest.fail(f"{provider}: {reason}")
        if reason is not None:
            self._store(case, provider, {"refused": reason}, store)
            pytest.skip(f"{provider}: {reason}")
        inputs = case.inputs()
        step = measure.synchronised(case.step(self.providers[provider].function, inputs), case.device)
        benchmark.group = str(case)
        got = benchmark.pedantic(step, rounds=1)
        figures = self._figures(case, inputs, got, self.timings(case)[provider])
        figures["peak_mib"] = round(measure.peak_bytes(step, case.device) / 2**20, 2)
        benchmark.extra_info.update(figures)
        red = contract_gate.refusal(self.spec.name, provider, store)
        # For `pytest -s` into a log: what was measured is kept when the run is cut short, and marked where it may not be reported.
        print(
            json.dumps({"op": self.spec.name, "case": str(case), "provider": provider, **figures, "red": red}),
            flush=True,
        )
        self._store(case, provider, figures if red is None else {"refused": red}, store)
        if red is not None:
            pytest.skip(f"{provider}: {red}")

    def _figures(
        self, case: Case, inputs: list[Tensor], got: list[Tensor], mine: measure.Timing
    ) -> dict[str, float | int]:
        options = dict(case.options)
        moved, done = (
            count(*in_taps(inputs, case.taps), **options, backward=bool(case.trained))
            for count in (self.spec.bytes, self.spec.flops)
        )
        floor = machine.peaks(case.device, case.dtype).floor(moved, done, self.unit)
        return {
            "median_ms": round(mine.median * 1e3, 4),
            "spread_ms": round(mine.spread * 1e3, 4),
            **({"host_ms": round(mine.host * 1e3, 4)} if mine.host is not None else {}),
            "tensors_mib": round(measure.size([*{id(t): t for t in inputs}.values(), *got]) / 2**20, 2),
            "bytes": moved,
            "flops": done,
            "floor_ms": round(floor * 1e3, 4),
            **(
                {"error": float(f"{measure.relative_error(got, self.truth(case)):.2e}")}
                if self.exact(case, got)
                else {}
            ),
        }

    def exact(self, case: Case, got: Sequence[Tensor]) -> bool:
        """Whether results are held against float64: not where that is too large, nor a yardstick's, which computes something else."""
        return case.exact and [t.shape for t in got] == [t.shape for t in self.truth(case)]

    def _store(self, case: Case, provider: str, figures: dict[str, Any], store: bool) -> None:
        if not store:
            return
        where = machine.name(case.device)
        row = {
            "op": self.spec.name,
            "provider": provider,
            "mode": case.mode,
            "case": case.name,
            "shape": case.shape,
            "dtype": case.precision,
            "machine": where,
            "versions": machine.versions(),
            "date": datetime.date.today().isoformat(),
            **{key: str(value) for key, value in figures.items()},
        }
        results.store(where, [row])

    def speedups(self, cases: Iterable[Case], over: str = "best", by: str = "kdops.cpu") -> dict[str, float]:
        """How many times faster provider `by` is than `over`, or than the best of all baselines; printed as it is found."""
        found = {}
        for case in cases:
            times = self.timings(case)
            others = {n: t.median for n, t in times.items() if n in self.baselines}
            rival = min(others, key=lambda n: others[n]) if over == "best" else over
            found[str(case)] = others[rival] / times[by].median
            print(
                f"\n{case}: {times[by].median * 1e3:.2f} ms, {found[str(case)]:.2f} times faster than {rival}", end=""
            )
        print(f"\ngeometric mean: {geometric_mean(found.values()):.2f}")
        return found


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))
