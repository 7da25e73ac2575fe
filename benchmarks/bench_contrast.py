"""Pairwise L1 distances, forward and backward: kdops against eager torch, torch.compile and torch.cdist.

    pytest benchmarks/bench_contrast.py --benchmark-only     one row per case, gradients and provider
    pytest benchmarks/bench_contrast.py -k goal              at least 3 times faster than torch.cdist, 1.2 times the memory of the tensors

A row's extra_info holds the ratio to the provider `eager` of interleaved medians, delta of peak memory, bytes and FLOPs that must
move and be done (from the spec), and the error against float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import measure
import pytest
import torch
from torch import Tensor

import kdops
from kdops.contrast import reference
from kdops.dispatch import SPECS

SPEC = SPECS["pairwise_distance"]
CUDA = torch.cuda.is_available()

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, *F), (K, *F) -> (B, K), summed over the features


def kdops_on(backend: str) -> Distance:
    return lambda x, y: kdops.pairwise_distance(x, y, p=1, statistic="sum", backend=backend)


def eager(x: Tensor, y: Tensor) -> Tensor:
    return reference.pairwise_distance(x, y, 1)


def cdist(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32) if x.is_cuda else x.dtype  # on CUDA it takes no 16-bit numbers
    return torch.cdist(x.flatten(1).to(wide), y.flatten(1).to(wide), p=1)


PROVIDERS: dict[str, Distance] = {
    "kdops.cpu": kdops_on("cpu"),
    "kdops.triton": kdops_on("triton"),
    "kdops.cuda": kdops_on("cuda"),
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
    "cdist": cdist,
}


@dataclass(frozen=True)
class Case:
    name: str
    device: str
    dtype: torch.dtype
    rows: tuple[int, int]  # B, K
    features: tuple[int, ...]
    both: bool = field(default=True)  # gradients for both inputs, or for x alone

    def __str__(self) -> str:
        return f"{self.name}-{'both' if self.both else 'one'}"

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(n, *self.features, generator=generator).to(self.device, self.dtype) for n in self.rows)
        return [x.requires_grad_(), y.requires_grad_(self.both)]

    def step(self, distance: Distance, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Forward and backward, returning the distances and the gradients that are asked for."""
        upstream = torch.linspace(-1, 1, self.rows[0] * self.rows[1], device=self.device).view(self.rows)
        wanted = [t for t in inputs if t.requires_grad]

        def run() -> list[Tensor]:
            out = distance(*inputs)
            return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]

        return run

    def providers(self) -> dict[str, str | None]:
        """Every provider of this device, with the reason why it cannot run (None: it can)."""
        ours = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}[self.device]
        inputs = self.inputs()
        return {
            **{f"kdops.{backend}": SPEC.backend(backend).supports(inputs) for backend in ours},
            **dict.fromkeys(("eager", "compile", "cdist")),
        }


def _cases() -> list[Case]:
    shapes = [("feature maps", "cpu", torch.float32, (16, 16), (64, 48, 48))]  # 147,456 features
    if CUDA:
        shapes += [
            ("large bf16", "cuda", torch.bfloat16, (16, 64), (64, 256, 256)),
            ("feature maps", "cuda", torch.float32, (16, 16), (64, 48, 48)),
        ]
    return [Case(f"{name} {device}", device, *rest, both) for name, device, *rest in shapes for both in (True, False)]


CASES = _cases()
ROWS = [(case, provider) for case in CASES for provider in case.providers()]


@cache
def timings(case: Case) -> dict[str, measure.Timing]:
    inputs = case.inputs()
    able = [name for name, reason in case.providers().items() if reason is None]
    calls = {name: measure.synchronised(case.step(PROVIDERS[name], inputs), case.device) for name in able}
    return measure.interleave(calls)


@cache
def truth(case: Case) -> list[Tensor]:
    """Distances and gradients in float64, one pair of rows at a time so that it fits."""
    x, y = (t.detach().double().flatten(1) for t in case.inputs())
    upstream = torch.linspace(-1, 1, len(x) * len(y), device=x.device).view(len(x), len(y)).double()
    distance = torch.stack([(row - y).abs().sum(1) for row in x])
    grads = [torch.stack([(upstream[i, :, None] * (x[i] - y).sign()).sum(0) for i in range(len(x))])]
    if case.both:
        grads.append(torch.stack([(upstream[:, k, None] * (y[k] - x).sign()).sum(0) for k in range(len(y))]))
    return [distance, *grads]


@pytest.mark.parametrize(("case", "provider"), ROWS, ids=lambda value: str(value))
def test_row(benchmark: pytest.FixtureRequest, case: Case, provider: str) -> None:
    reason = case.providers()[provider]
    if reason is not None:
        pytest.skip(f"{provider}: {reason}")
    inputs = case.inputs()
    step = measure.synchronised(case.step(PROVIDERS[provider], inputs), case.device)
    benchmark.group = str(case)
    got = benchmark(step)
    moved, done = (count(*inputs, p=1, backward=True) for count in (SPEC.bytes, SPEC.flops))
    mine = timings(case)[provider]
    benchmark.extra_info.update(
        median_ms=mine.median * 1e3,
        spread_ms=mine.spread * 1e3,
        times_faster_than_eager=timings(case)["eager"].median / mine.median,
        peak_mib=measure.peak_bytes(step, case.device) / 2**20,
        tensors_mib=measure.size([*inputs, *got]) / 2**20,
        bytes=moved,
        flops=done,
        gb_per_s=moved / mine.median / 1e9,
        gflop_per_s=done / mine.median / 1e9,
        error=measure.relative_error([t.flatten(1) for t in got], truth(case)),
    )
    # For `pytest -s` into a log: what was measured is kept when the run is cut short.
    print(json.dumps({"case": str(case), "provider": provider, **benchmark.extra_info}), flush=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.device == "cpu"], ids=str)
def test_goal(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Issue 2: at least 3 times faster than torch.cdist, and below 1.2 times the memory of inputs and gradients."""
    inputs = case.inputs()
    ours, theirs = (case.step(PROVIDERS[name], inputs) for name in ("kdops.cpu", "cdist"))
    times = measure.interleave({"ours": ours, "theirs": theirs}, rounds=25)
    ratio = times["theirs"].median / times["ours"].median
    tensors = measure.size([*inputs, *ours()[1:]])
    memory = (measure.size(inputs) + measure.peak_bytes(ours, case.device)) / tensors
    print(f"\n{case}: {ratio:.1f} times faster than torch.cdist, {memory:.2f} times the memory of inputs and gradients")
    record_property("times_faster_than_cdist", ratio)
    record_property("memory_over_tensors", memory)
    assert ratio >= 3
    assert memory < 1.2
