"""Channel attention and its distance: kdops against eager torch and torch.compile.

    pytest benchmarks/bench_channel_attention.py --benchmark-only [--store]     one row per case and provider
    pytest benchmarks/bench_channel_attention.py -k goal                        at least level with the best of them

A case is the shape of a network's features in one form of distillation: the teacher queries and is the target (key and value are one
student tensor), or every input needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite import Case, Suite, eager_and_compiled, geometric_mean
from kdops.channel_attention import reference


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.channel_attention(query, key, value, None, 1)


def eager_distance(query: Tensor, key: Tensor, value: Tensor, target: Tensor) -> Tensor:
    return reference.channel_attention_distance(query, key, value, target, None, 1, mean=True)


EAGER = {"channel_attention": eager_attention, "channel_attention_distance": eager_distance}
FORMS = {  # which tensor is query, key, value and target
    "teacher queries": (0, 1, 1, 0),
    "all": (0, 1, 2, 3),
}


def _case(op: str, name: str, form: str, rounds: int, *shape: int, **more: Any) -> Case:
    arguments = FORMS[form] if op.endswith("distance") else FORMS[form][:3]
    count = len(set(arguments))
    trained = (1,) if form == "teacher queries" else tuple(range(count))
    return Case(f"{name}, {form}", (shape,) * count, trained, arguments, rounds=rounds, **more)


SHAPES = [  # networks' features, and rounds to time
    ("EDSR", 15, 16, 64, 48, 48),
    ("Restormer 1", 15, 2, 48, 128, 128),
    ("Restormer 2", 25, 2, 96, 64, 64),
    ("Restormer 3", 25, 2, 192, 32, 32),
    ("Restormer 4", 25, 2, 384, 16, 16),
    ("high resolution", 7, 1, 48, 256, 256),
]
CASES = {op: [_case(op, name, form, *rest) for name, *rest in SHAPES for form in FORMS] for op in EAGER}
GPU = {
    op: [
        _case(op, "high resolution", form, 20, 16, c, 256, 256, device="cuda", dtype=torch.bfloat16, exact=False)
        for c in (64, 180)
        for form in FORMS
    ]
    for op in EAGER
}


SUITES = {op: Suite(op, [*CASES[op], *GPU[op]], eager_and_compiled(eager)) for op, eager in EAGER.items()}
ROWS = [(op, *row) for op, suite in SUITES.items() for row in suite.rows()]


@pytest.mark.parametrize(("op", "case", "provider"), ROWS, ids=str)
def test_row(benchmark: Any, store: bool, op: str, case: Case, provider: str) -> None:
    SUITES[op].row(benchmark, case, provider, store)


@pytest.mark.parametrize("op", SUITES)
def test_goal(op: str, record_property: Callable[[str, object], None]) -> None:
    """Issue 3: at least level with the best of eager torch and torch.compile, at every shape."""
    ratios = SUITES[op].speedups(CASES[op])
    record_property("geometric_mean", geometric_mean(ratios.values()))
    assert min(ratios.values()) >= 1
