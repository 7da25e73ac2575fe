"""Spatial attention: kdops against eager torch, torch.compile and scaled dot-product attention (SDPA).

    pytest benchmarks/bench_spatial_attention.py --benchmark-only [--store]     one row per case and provider
    pytest benchmarks/bench_spatial_attention.py -k goal                        never slower than any, 1.2 times faster than SDPA

A case is the shape of a network's features in one form of distillation: the teacher queries (key and value are one student
tensor), the student queries (it is query and value, the key is frozen), or all three differ and need a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.suite import Case, Provider, Suite, eager_and_compiled, geometric_mean
from kdops.spatial_attention import reference


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.spatial_attention(query, key, value, None, False)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # (B, 1 head, N, C), contiguous: else it takes the path that holds the N x N matrix.
    rows = [t.flatten(2).transpose(1, 2).contiguous().unsqueeze(1) for t in (query, key, value)]
    return scaled_dot_product_attention(*rows).transpose(2, 3).reshape(query.shape)


FORMS = {  # which tensor is query, key and value, and which are trained
    "teacher queries": ((0, 1, 1), (1,)),
    "student queries": ((1, 0, 1), (1,)),
    "all": ((0, 1, 2), (0, 1, 2)),
}
HELD = 5  # matrices of weights that eager torch has at once at its peak


def _case(name: str, form: str, rounds: int, *shape: int, **more: Any) -> Case:
    arguments, trained = FORMS[form]
    pairs = shape[0] * (shape[2] * shape[3]) ** 2
    return Case(
        f"{name}, {form}",
        (shape,) * len(set(arguments)),
        trained,
        arguments,
        rounds=rounds,
        held=HELD * 4 * pairs,
        exact=pairs <= 2**24,
        **more,
    )


SHAPES = [  # networks' features, and rounds to time
    ("EDSR", 7, 16, 64, 48, 48),
    ("Restormer 1", 3, 2, 48, 128, 128),
    ("Restormer 2", 7, 2, 96, 64, 64),
    ("Restormer 3", 25, 2, 192, 32, 32),
    ("Restormer 4", 51, 2, 384, 16, 16),
]
CASES = [_case(name, form, *rest) for name, *rest in SHAPES for form in FORMS]
LARGE = _case("high resolution", "student queries", 2, 1, 48, 256, 256)
GPU = [
    _case("high resolution", form, 10, 1, c, 256, 256, device="cuda", dtype=torch.bfloat16)
    for c in (64, 128, 180, 256, 384)
    for form in ("teacher queries", "student queries")
]


SWEEP = [
    _case("growing N", "teacher queries", rounds, 1, 48, side, side)
    for side, rounds in ((16, 51), (32, 25), (64, 9), (128, 3), (256, 2))
]
SUITE = Suite("spatial_attention", [*CASES, LARGE, *SWEEP, *GPU], {**eager_and_compiled(eager), "sdpa": Provider(sdpa)})


@pytest.mark.parametrize(("case", "provider"), SUITE.rows(), ids=str)
def test_row(benchmark: Any, store: bool, case: Case, provider: str) -> None:
    SUITE.row(benchmark, case, provider, store)


def test_goal(record_property: Callable[[str, object], None]) -> None:
    """Issue 3: never slower than the best of all, at least 1.2 times faster than SDPA in geometric mean."""
    mean = geometric_mean(SUITE.speedups(CASES, over="sdpa").values())
    record_property("geometric_mean", mean)
    assert mean >= 1.2
    assert min(SUITE.speedups(CASES).values()) >= 1
