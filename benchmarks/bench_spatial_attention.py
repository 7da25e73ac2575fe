"""Spatial attention, forward and backward: kdops against eager torch, torch.compile and scaled dot-product attention (SDPA).

    pytest benchmarks/bench_spatial_attention.py --benchmark-only     one row per case and provider
    pytest benchmarks/bench_spatial_attention.py -k goal              against SDPA: never slower, 1.2 times in geometric mean

A case is the shape of a network's features in one form of distillation: the teacher queries (key and value are one student
tensor), the student queries (it is query and value, the key is frozen), or all three differ and need a gradient. A row's extra_info
holds the ratio to SDPA of interleaved medians, delta of peak memory, bytes and FLOPs that must move and be done (from the spec), and
the error against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import exp, log

import measure
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kdops
from kdops.dispatch import SPECS
from kdops.spatial_attention import reference

SPEC = SPECS["spatial_attention"]
HELD = 5  # matrices of weights that eager torch has at once at its peak
MOST = 8 * 2**30  # bytes that a provider may take
EXACT = 2**24  # pairs of positions up to which the error is measured

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return kdops.spatial_attention(query, key, value, backend="cpu")


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.spatial_attention(query, key, value, None, False)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # (B, 1 head, N, C), contiguous: else it takes the path that holds the N x N matrix.
    rows = [t.flatten(2).transpose(1, 2).contiguous().unsqueeze(1) for t in (query, key, value)]
    return scaled_dot_product_attention(*rows).transpose(2, 3).reshape(query.shape)


PROVIDERS: dict[str, Attention] = {
    "kdops.cpu": ours,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
    "sdpa": sdpa,
}

ROLES = {"teacher queries": (0, 1, 1), "student queries": (1, 0, 1), "all": (0, 1, 2)}  # tensors as query, key, value


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    form: str
    rounds: int

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}, {self.form}"

    @property
    def pairs(self) -> int:
        return int(self.shape[0]) * (self.shape[2] * self.shape[3]) ** 2

    def inputs(self) -> list[Tensor]:
        """Query, key and value, of which one may be another's very tensor. The teacher's needs no gradient."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(self.shape, generator=generator) for _ in set(ROLES[self.form])]
        for i, t in enumerate(drawn):
            t.requires_grad_(i > 0 or self.form == "all")
        return [drawn[role] for role in ROLES[self.form]]

    def step(self, attention: Attention, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Forward and backward, returning the result and the gradients."""
        upstream = torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
        wanted = list({id(t): t for t in inputs if t.requires_grad}.values())

        def run() -> list[Tensor]:
            out = attention(*inputs)
            return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

        return run

    def refusal(self, provider: str) -> str | None:
        """Why a provider does not run this case."""
        if provider.startswith("kdops"):
            return SPEC.backend(provider.removeprefix("kdops.")).supports(self.inputs())
        needs = HELD * 4 * self.pairs
        if provider in ("eager", "compile") and needs > MOST:
            return f"about {HELD} matrices of weights are {needs / 2**30:.0f} GiB, above the {MOST / 2**30:.0f} GiB allowed here"
        return None


SHAPES = [  # networks' features, and rounds to time
    ("EDSR", (16, 64, 48, 48), 7),
    ("Restormer 1", (2, 48, 128, 128), 3),
    ("Restormer 2", (2, 96, 64, 64), 7),
    ("Restormer 3", (2, 192, 32, 32), 25),
    ("Restormer 4", (2, 384, 16, 16), 51),
]
CASES = [Case(name, shape, form, rounds) for name, shape, rounds in SHAPES for form in ROLES]
LARGE = Case("high resolution", (1, 48, 256, 256), "teacher queries", 1)


@cache
def timings(case: Case) -> dict[str, measure.Timing]:
    inputs = case.inputs()
    able = [name for name in PROVIDERS if case.refusal(name) is None]
    return measure.interleave({name: case.step(PROVIDERS[name], inputs) for name in able}, max(case.rounds, 2))


@cache
def truth(case: Case) -> list[Tensor]:
    """In float64, with tensors that have two roles still shared."""
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in case.inputs()}
    return case.step(eager, [wide[id(t)] for t in case.inputs()])()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_row(benchmark: pytest.FixtureRequest, case: Case, provider: str) -> None:
    reason = case.refusal(provider)
    if reason is not None:
        pytest.skip(f"{provider}: {reason}")
    inputs = case.inputs()
    step = case.step(PROVIDERS[provider], inputs)
    benchmark.group = str(case)
    if case is LARGE:
        got = benchmark.pedantic(step, rounds=1)
        median = benchmark.stats.stats.median
    else:
        got = benchmark(step)
        median = timings(case)[provider].median
        benchmark.extra_info["times_faster_than_sdpa"] = timings(case)["sdpa"].median / median
    moved, done = (count(*inputs, backward=True) for count in (SPEC.bytes, SPEC.flops))
    benchmark.extra_info.update(
        median_ms=median * 1e3,
        peak_mib=measure.peak_bytes(step, "cpu") / 2**20,
        tensors_mib=measure.size([*{id(t): t for t in inputs}.values(), *got]) / 2**20,
        bytes=moved,
        flops=done,
        gflop_per_s=done / median / 1e9,
    )
    if case.pairs <= EXACT:
        benchmark.extra_info["error"] = measure.relative_error(got, truth(case))


def test_goal(record_property: Callable[[str, object], None]) -> None:
    """Issue 3: never slower than SDPA, at least 1.2 times faster in geometric mean."""
    ratios = {}
    for case in CASES:
        inputs = case.inputs()
        times = measure.interleave(
            {name: case.step(PROVIDERS[name], inputs) for name in ("kdops.cpu", "sdpa")}, case.rounds
        )
        ratios[str(case)] = times["sdpa"].median / times["kdops.cpu"].median
        print(
            f"\n{case}: {times['kdops.cpu'].median * 1e3:.1f} ms, {ratios[str(case)]:.2f} times faster than SDPA",
            end="",
        )
    mean = exp(sum(log(ratio) for ratio in ratios.values()) / len(ratios))
    print(f"\ngeometric mean: {mean:.2f}")
    record_property("geometric_mean", mean)
    assert min(ratios.values()) >= 1
    assert mean >= 1.2
