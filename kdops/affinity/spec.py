"""Schemas, fakes, autograd, backends, costs and sample inputs of the affinity distance."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from ..registration import accumulator, gradient_like
from . import reference

NAME = "affinity_distance"
SLOPES = 48  # their sides are padded to a multiple of this (csrc/affinity.cpp)
CPU = "kdops.affinity.cpu"
TRITON = "kdops.affinity.triton"
NO_DOUBLE_BACKWARD = (
    "a distillation loss is differentiated once, and the second derivative of p=1 is zero almost everywhere"
)


def by_grams(student: Tensor, teacher: Tensor, p: int) -> bool:
    """Whether p=2 goes by C x C Gram matrices in float64 or, as p=1, by N x N tiles: which costs less."""
    return p == 2 and prod(student.shape[2:]) > 2 * (student.shape[1] + teacher.shape[1])


def keeps_slopes(student: Tensor, teacher: Tensor, p: int) -> bool:
    """Whether the CPU keeps the slopes of all pairs of positions for backward: where they are no more numbers than both maps have."""
    return not by_grams(student, teacher, p) and prod(student.shape[2:]) <= student.shape[1] + teacher.shape[1]


def _fake_distance(student: Tensor, teacher: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    distance, grams = _fake_triton_distance(student, teacher, p, eps)
    if by_grams(student, teacher, p):
        return distance, grams
    side = -(-prod(student.shape[2:]) // SLOPES) * SLOPES
    slopes = (student.shape[0], side, side) if keeps_slopes(student, teacher, p) else (0,)
    return distance, distance.new_empty(slopes)


def _fake_triton_distance(student: Tensor, teacher: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    dtype = accumulator(student)
    channels = student.shape[1] + teacher.shape[1]
    grams = (student.shape[0], channels, channels) if by_grams(student, teacher, p) else (0,)
    return student.new_empty(student.shape[0], dtype=dtype), student.new_empty(grams, dtype=torch.float64)


def _fake_backward(
    grad: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor,
    p: int,
    eps: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    return gradient_like(student, need_student), gradient_like(teacher, need_teacher)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.p, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], student, teacher)


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        need_student, need_teacher = ctx.needs_input_grad[:2]
        of_student, of_teacher = op(grad, *ctx.saved_tensors, ctx.p, ctx.eps, need_student, need_teacher)
        return of_student if need_student else None, of_teacher if need_teacher else None, None, None

    return backward


_INPUTS = "Tensor student, Tensor teacher, int p, float eps"
registration.define(
    NAME, f"({_INPUTS}) -> (Tensor, Tensor)", _fake_distance, TRITON, CPU, triton_fake=_fake_triton_distance
)
registration.define(
    f"{NAME}_backward",
    f"(Tensor grad, Tensor kept, {_INPUTS}, bool need_student, bool need_teacher) -> (Tensor, Tensor)",
    _fake_backward,
    TRITON,
    CPU,
)
registration.differentiate(NAME, _setup_context, _backward, NO_DOUBLE_BACKWARD)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _bytes(student: Tensor, teacher: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    both = size(student, teacher)
    return both + backward * (both + size(*(t for t in (student, teacher) if t.requires_grad)))


def _flops(student: Tensor, teacher: Tensor, *, p: int = 1, backward: bool = False, **kwargs: Any) -> int:
    batch, positions = student.shape[0], prod(student.shape[2:])
    channels = student.shape[1] + teacher.shape[1]
    wanted = sum(t.shape[1] for t in (student, teacher) if t.requires_grad)
    if by_grams(student, teacher, p):  # three Grams, of which backward applies two to each
        grams = student.shape[1] ** 2 + student.shape[1] * teacher.shape[1] + teacher.shape[1] ** 2
        return 2 * batch * positions * (grams + wanted * channels * backward)
    # Half of the tiles; backward makes them again, if their slopes are not kept, and multiplies each by both of its sides.
    again = backward and not keeps_slopes(student, teacher, p)
    return batch * positions**2 * (channels * (1 + again) + 2 * wanted * backward)


def _scratch_bytes(student: Tensor, teacher: Tensor, *, p: int = 1, backward: bool = False, **kwargs: Any) -> int:
    positions, channels = prod(student.shape[2:]), student.shape[1] + teacher.shape[1]
    if by_grams(student, teacher, p):
        return 8 * student.shape[0] * channels**2 + 8 * 2**20  # the Grams and some strips
    # Normalised columns of both, packed for either side of a tile; in backward also as values, beside the sums and their gradient.
    wanted = sum(t.shape[1] for t in (student, teacher) if t.requires_grad)
    rows = student.shape[0] * positions * max(4, student.element_size())
    slopes = positions + SLOPES if keeps_slopes(student, teacher, p) else 0
    return rows * (3 * channels + 5 * backward * wanted + slopes) + 2**20


# --- backends and samples --------------------------------------------------------------------------------------------------------


def _kernel(op: registration.Op) -> Callable[..., Tensor]:
    def call(student: Tensor, teacher: Tensor, p: int, eps: float) -> Tensor:
        distance: Tensor = op(student, teacher, p, eps)[0]  # the others are for backward
        return distance

    return call


def _shapes(b: int, cs: int, ct: int, *s: int) -> tuple[tuple[int, ...], ...]:
    return ((b, cs, *s), (b, ct, *s))


# Of equal channel counts: with others, two constant maps would agree but for rounding (tests/ops/test_affinity.py has them).
_SAMPLES = (
    Sample("p=1", _shapes(2, 6, 6, 5, 7)),
    Sample("p=2, many positions", _shapes(2, 3, 3, 6, 7), {"p": 2}),
    Sample("p=2, few positions", _shapes(2, 8, 8, 3, 3), {"p": 2, "statistic": "sum"}),
    Sample("prime", _shapes(3, 7, 7, 11), {"statistic": "sum"}),
    Sample("one of each", _shapes(1, 1, 1, 1), {"eps": 0.5}),
    Sample("volume", _shapes(1, 3, 3, 3, 4, 5), {"p": 1}),
    Sample("empty batch", _shapes(0, 4, 4, 3, 2)),
)


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about the public function of this op."""
    dispatch.register(
        OpSpec(
            name=NAME,
            function=function,
            backends=(
                Backend("cpu", _kernel(registration.op(NAME)), dispatch.supports_cpu),
                Backend("triton", _kernel(registration.op(NAME, "_triton")), dispatch.supports_triton),
                Backend("reference", reference.affinity_distance, dispatch.supports_reference),
            ),
            samples=_SAMPLES,
            bytes=_bytes,
            flops=_flops,
            scratch_bytes=_scratch_bytes,
            raw_ops=(NAME, f"{NAME}_backward"),
            no_double_backward=NO_DOUBLE_BACKWARD,
        )
    )
