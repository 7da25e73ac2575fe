"""The cross-entropy over a codebook: kdops against eager torch and torch.compile.

    pytest benchmarks/bench_codebook.py --benchmark-only [--store]     one row per case and provider
    pytest benchmarks/bench_codebook.py -k goal                        1.3 times faster than torch.compile, and never slower than the best

Teacher and codebook are frozen, but for the case that says so. Temperatures of the order of a squared distance keep the softmaxes soft:
no provider gains from weights that are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite import Case, Suite, eager_and_compiled, geometric_mean
from kdops.codebook import reference


def eager(student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    return reference.codebook_cross_entropy(student, teacher, codebook, temperature).mean()


HELD = 6  # M x K matrices that eager torch has at once at its peak


def _case(
    name: str, rounds: int, rows: tuple[int, ...], codes: int, trained: tuple[int, ...] = (0,), **more: Any
) -> Case:
    positions = rows[0] * int(torch.Size(rows[2:]).numel())
    channels = rows[1]
    return Case(
        name,
        (rows, rows, (codes, channels)),
        trained,
        options=(("temperature", float(channels)),),
        rounds=rounds,
        held=HELD * 4 * positions * codes,
        exact=positions * codes <= 2**23,
        **more,
    )


CASES = [
    _case("DCKD, 16 images of 256x256", 15, (16, 256, 16, 16), 1024),
    _case("rows", 15, (4096, 256), 1024),
    _case("rows, few channels", 15, (4096, 64), 1024),
    _case("rows, many channels", 9, (2048, 512), 1024),
    _case("many codes", 5, (1024, 256), 16384),
]
OTHERS = [
    _case("256x256 positions", 2, (1, 256, 256, 256), 1024),
    _case("teacher and codebook learn", 9, (4096, 256), 1024, (0, 1, 2)),  # eight products against six: memory for time
]
GPU = [
    _case("256x256 positions, 16 images", 10, (16, 64, 256, 256), 1024, device="cuda", dtype=torch.bfloat16),
    _case("many codes", 10, (16, 256, 64, 64), 16384, device="cuda", dtype=torch.bfloat16),
]
SUITE = Suite("codebook_cross_entropy", [*CASES, *OTHERS, *GPU], eager_and_compiled(eager))


@pytest.mark.parametrize(("case", "provider"), SUITE.rows(), ids=str)
def test_row(benchmark: Any, store: bool, case: Case, provider: str) -> None:
    SUITE.row(benchmark, case, provider, store)


def test_goal(record_property: Callable[[str, object], None]) -> None:
    """Issue 4: at least 1.3 times faster than torch.compile in geometric mean; never slower than the best."""
    mean = geometric_mean(SUITE.speedups(CASES, over="compile").values())
    record_property("geometric_mean", mean)
    assert mean >= 1.3
    assert min(SUITE.speedups(CASES).values()) >= 1
