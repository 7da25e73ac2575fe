"""Schemas, fakes, autograd, backends, costs and sample inputs of the cross-entropy over a codebook."""

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

TRITON = "kdops.codebook.triton"
NO_DOUBLE_BACKWARD = (
    "its kernels recompute the softmaxes instead of keeping them, and have no formula for the second derivative"
)

FORWARD = (
    "(Tensor student, Tensor teacher, Tensor codebook, float temperature, bool need_student, bool need_teacher) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor grad, Tensor student, Tensor teacher, Tensor codebook, Tensor statistics, Tensor student_slopes, Tensor teacher_slopes, "
    "float temperature, bool need_student, bool need_teacher, bool need_codebook) -> (Tensor, Tensor, Tensor)"
)


def _fake(
    student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each of the M positions; five statistics of their softmaxes; slopes (M, D) of the loss for student and teacher.

    Slopes are moments of the codes under the softmaxes: one vector for each position, whatever its upstream gradient will be. Keeping them
    saves the backward pass two products of five. They are made where a gradient will be asked for, else they are empty.
    """
    slopes = [(_positions(student), student.shape[1]) if needed else (0,) for needed in (need_student, need_teacher)]
    dtype = accumulator(student)
    return (
        *_fake_statistics(student),
        student.new_empty(slopes[0], dtype=dtype),
        student.new_empty(slopes[1], dtype=dtype),
    )


def _fake_triton(
    student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, with slopes in the shape and the strides of the maps: then backward reads and writes in one order."""
    slopes = (gradient_like(t, need, torch.float32) for t, need in ((student, need_student), (teacher, need_teacher)))
    return *_fake_statistics(student), *slopes  # type: ignore[return-value]


def _fake_statistics(student: Tensor) -> tuple[Tensor, Tensor]:
    positions, dtype = _positions(student), accumulator(student)
    return student.new_empty(positions, dtype=dtype), student.new_empty((5, positions), dtype=dtype)


def _fake_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    codebook: Tensor,
    statistics: Tensor,
    student_slopes: Tensor,
    teacher_slopes: Tensor,
    temperature: float,
    need_student: bool,
    need_teacher: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gradient_like(student, need_student),
        gradient_like(teacher, need_teacher),
        gradient_like(codebook, need_codebook),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, bool, bool], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    student, teacher, codebook, ctx.temperature, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every backward pass would be handed zeros of the size of the slopes
    ctx.save_for_backward(student, teacher, codebook, *output[1:])


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing depends on the loss
            return (None,) * 6
        need = ctx.needs_input_grad[:3]
        student, teacher, _, _, *slopes = ctx.saved_tensors
        for name, t, kept, needed in zip(("student", "teacher"), (student, teacher), slopes, need[:2], strict=True):
            if needed and kept.numel() < t.numel():
                raise RuntimeError(
                    f"codebook_cross_entropy: {name} needs a gradient, but needed none where the op was called or captured (by "
                    f"torch.export, say), and so its slopes were not kept: capture it with a {name} that requires a gradient."
                )
        grads = op(grad, *ctx.saved_tensors, ctx.temperature, *need)
        return (*(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None, None)

    return backward


registration.define("codebook_cross_entropy", FORWARD, _fake, TRITON, triton_fake=_fake_triton)
registration.define("codebook_cross_entropy_backward", BACKWARD, _fake_backward, TRITON)
registration.differentiate("codebook_cross_entropy", _setup_context, _backward, NO_DOUBLE_BACKWARD)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _positions(student: Tensor) -> int:
    return student.shape[0] * prod(student.shape[2:])


def _bytes(student: Tensor, teacher: Tensor, codebook: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads the inputs; backward reads them again and writes the gradients that are asked for.
    given = (student, teacher, codebook)
    return size(*given) + backward * (size(*given) + size(*(t for t in given if t.requires_grad)))


def _flops(student: Tensor, teacher: Tensor, codebook: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # In products of M x K x D. Forward: the logits of both. A gradient of student or teacher: one. The codebook's: one of each network,
    # by weights that need the logits again.
    products = 2 + backward * (student.requires_grad + teacher.requires_grad + 4 * codebook.requires_grad)
    return products * 2 * _positions(student) * codebook.numel()


def _scratch_bytes(student: Tensor, teacher: Tensor, codebook: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # Loss and statistics, the slopes, and on the CPU two packed copies of the codebook and up to 16 sums (64 MiB) of its gradient.
    wide = accumulator(student).itemsize
    slopes = student.numel() * (student.requires_grad + teacher.requires_grad)
    sums = codebook.numel() * min(16, max(1, 2**26 // (wide * codebook.numel())))
    return wide * (6 * _positions(student) + slopes + 2 * codebook.numel() + backward * codebook.requires_grad * sums)


# --- backends and samples --------------------------------------------------------------------------------------------------------


def _kernel(op: registration.Op) -> Callable[..., Tensor]:
    def run(student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float) -> Tensor:
        keep = torch.is_grad_enabled()
        loss: Tensor = op(
            student, teacher, codebook, temperature, keep and student.requires_grad, keep and teacher.requires_grad
        )[0]
        return loss

    return run


BACKENDS = (
    Backend("cpu", _kernel(registration.op("codebook_cross_entropy")), dispatch.supports_cpu),
    Backend("triton", _kernel(registration.op("codebook_cross_entropy", "_triton")), dispatch.supports_triton),
    Backend("reference", reference.codebook_cross_entropy, dispatch.supports_reference),
)

SAMPLES = (
    Sample("rows", ((37, 12), (37, 12), (64, 12)), {"temperature": 4.0}),
    Sample("maps, each position", ((2, 7, 3, 4), (2, 7, 3, 4), (19, 7)), {"reduction": "none"}),
    Sample("several tiles", ((1, 20, 61), (1, 20, 61), (130, 20)), {"temperature": 8.0, "reduction": "sum"}),
    Sample("one of each", ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1))),
    Sample("empty batch", ((0, 4, 6), (0, 4, 6), (5, 4)), {"reduction": "sum"}),
)


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about the public function."""
    dispatch.register(
        OpSpec(
            name=function.__name__,
            function=function,
            backends=BACKENDS,
            samples=SAMPLES,
            bytes=_bytes,
            flops=_flops,
            scratch_bytes=_scratch_bytes,
            raw_ops=("codebook_cross_entropy", "codebook_cross_entropy_backward"),
            no_double_backward=NO_DOUBLE_BACKWARD,
        )
    )
