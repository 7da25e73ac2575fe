"""Schemas, fakes, autograd, backends, costs and sample inputs of the Gaussian distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from ..registration import accumulator, gradient_like
from . import reference

NAME = "gaussian_distance"
TRITON = "kdops.gaussian.triton"

REDUCTIONS = ("none", "sum", "mean")  # as the raw operators number them

Taps = Sequence[Tensor]


def _fake(x: Taps, y: Taps, sigma: Sequence[float] | None, mean: bool, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distances, their derivatives by the sums of squares, and minus the logarithmic derivative of those."""
    slope = x[0].new_empty((len(x), x[0].shape[0]), dtype=accumulator(x[0]))
    rate = slope.new_empty(len(x))
    return torch.empty_like(rate if reduction else slope, dtype=x[0].dtype), slope, rate


def _fake_backward(
    grad: Tensor, slope: Tensor, x: Taps, y: Taps, need_x: Sequence[bool], need_y: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    def gradients(taps: Taps, need: Sequence[bool]) -> list[Tensor]:
        return [gradient_like(t, needed) for t, needed in zip(taps, need, strict=True)]

    return gradients(x, need_x), gradients(y, need_y)


def _setup_context(
    ctx: Any, inputs: tuple[Taps, Taps, Sequence[float] | None, bool, int], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, _, _, ctx.reduction = inputs
    _, slope, rate = output
    ctx.mark_non_differentiable(rate)
    ctx.set_materialize_grads(False)  # a slope has an upstream gradient only in double backward
    ctx.save_for_backward(slope, rate, *x, *y)


def _backward(op: registration.Op) -> Callable[..., Any]:
    """With D = sum (x - y)^2 of a sample: distance = -expm1(-rate D), slope = d distance / dD, d slope / dD = -rate slope.

    A reduced distance is the sum of those of all samples, or, with every slope, of their B-th parts.
    """

    def backward(ctx: Any, grad: Tensor | None, grad_slope: Tensor | None, _: None) -> tuple[Any, ...]:
        slope, rate, *taps = ctx.saved_tensors
        upstream = torch.zeros_like(slope) if grad is None else grad.unsqueeze(1) if ctx.reduction else grad
        if grad_slope is not None:
            upstream = upstream - grad_slope * rate.unsqueeze(1)
        count, need = len(taps) // 2, list(ctx.needs_input_grad[1:])
        need_x, need_y = need[:count], need[count:]
        if registration.batched(upstream):
            of_x = _gradients(upstream * slope, taps[:count], taps[count:])
            of_y = [-g for g in of_x]
        else:
            of_x, of_y = op(upstream.expand_as(slope), slope, taps[:count], taps[count:], need_x, need_y)
        return tuple(g if needed else None for g, needed in zip((*of_x, *of_y), need, strict=True))

    return backward


def _gradients(weight: Tensor, x: Taps, y: Taps) -> list[Tensor]:
    """2 weight (x - y) of every tap, in plain torch."""
    return [_scaled(row, a.to(row.dtype) - b, a.dtype) for row, a, b in zip(weight, x, y, strict=True)]


def _scaled(row: Tensor, direction: Tensor, dtype: torch.dtype) -> Tensor:
    """2 row direction, of a row (B,) and a direction (B, *F)."""
    return (2 * row.view(-1, *[1] * (direction.ndim - 1)) * direction).to(dtype)


def _setup_twice(
    ctx: Any, inputs: tuple[Tensor, Tensor, Taps, Taps, Sequence[bool], Sequence[bool]], output: Any
) -> None:
    grad, slope, x, y, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, slope, *x, *y)


def _backward_twice(ctx: Any, *grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Of 2 grad slope (x - y), the gradient of x, and its negative, that of y. In plain torch, which differentiates it once more."""
    grad, slope, *taps = ctx.saved_tensors
    weight = grad * slope
    count = len(taps) // 2
    rows, of_x = [], []
    for row, a, b, into_x, into_y in zip(weight, taps[:count], taps[count:], *grads, strict=True):
        difference = a.to(weight.dtype) - b  # wide, as everything here: products of large features overflow in float16
        along = torch.zeros_like(difference)  # the direction in which the difference x - y is asked about
        along = along if into_x is None else along + into_x
        along = along if into_y is None else along - into_y
        rows.append(2 * (difference * along).sum(tuple(range(1, a.ndim))))
        of_x.append(_scaled(row, along, a.dtype))
    of_weight = torch.stack(rows)
    return (of_weight * slope).to(grad.dtype), of_weight * grad, of_x, [-g for g in of_x], None, None


registration.define(
    NAME,
    "(Tensor[] x, Tensor[] y, float[]? sigma, bool mean, int reduction) -> (Tensor, Tensor, Tensor)",
    _fake,
    TRITON,
)
registration.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor slope, Tensor[] x, Tensor[] y, bool[] need_x, bool[] need_y) -> (Tensor[], Tensor[])",
    _fake_backward,
    TRITON,
)
registration.differentiate_lists(NAME, _setup_context, _backward, _setup_twice, _backward_twice)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _inputs(x: Tensor | Taps, y: Tensor | Taps) -> list[Tensor]:
    return [t for taps in (x, y) for t in ([taps] if isinstance(taps, Tensor) else taps)]


def _bytes(x: Tensor | Taps, y: Tensor | Taps, *, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads every input once; backward reads them again and writes the gradients that are asked for.
    given = _inputs(x, y)
    return size(*given) * (1 + backward) + backward * size(*(t for t in given if t.requires_grad))


def _flops(x: Tensor | Taps, y: Tensor | Taps, *, backward: bool = False, **kwargs: Any) -> int:
    # Forward: subtract, multiply, add. Backward: subtract, multiply, and once more for the sign of a second gradient.
    given = _inputs(x, y)
    wanted = sum(t.numel() for t in given if t.requires_grad)
    return sum(t.numel() for t in given) * 3 // 2 + backward * 2 * wanted


def _scratch_bytes(x: Tensor | Taps, y: Tensor | Taps, *, backward: bool = False, **kwargs: Any) -> int:
    # One sum of 4 bytes for every 2,048 features of a sample, or fewer.
    return sum(4 * t.shape[0] * -(-t[:1].numel() // 2**11) for t in _inputs(x, y)) // 2


# --- backends and samples --------------------------------------------------------------------------------------------------------


def _kernel(op: registration.Op) -> Callable[..., Tensor]:
    def run(x: list[Tensor], y: list[Tensor], sigma: list[float] | None, mean: bool, reduction: str) -> Tensor:
        distance: Tensor = op(x, y, sigma, mean, REDUCTIONS.index(reduction))[0]  # the rest is for backward
        return distance

    return run


BACKENDS = (
    Backend("cpu", _kernel(registration.op(NAME)), dispatch.supports_cpu),
    Backend("triton", _kernel(registration.op(NAME, "_triton")), dispatch.supports_triton),
    Backend("reference", reference.gaussian_distance, dispatch.supports_reference),
)

_ADAPTIVE = "an adaptive sigma depends on the inputs and by definition passes no gradient"
_TAPS = ((3, 4, 5, 7), (3, 2, 11), (3, 1))

SAMPLES = (
    Sample("one tap", ((3, 4, 5, 7), (3, 4, 5, 7))),
    Sample("sum, each sample", ((2, 3, 5), (2, 3, 5)), {"sigma": 4.0, "statistic": "sum", "reduction": "none"}),
    Sample("taps", (*_TAPS, *_TAPS), {"sigma": (0.5, 1.0, 2.0), "reduction": "sum"}, taps=3),
    Sample(
        "adaptive taps",
        (*_TAPS, *_TAPS),
        {"sigma": "adaptive", "reduction": "none"},
        taps=3,
        not_differentiable=_ADAPTIVE,
    ),
    Sample("long rows", ((2, 3, 1601), (2, 3, 1601)), {"sigma": 1.5}),
    Sample("one of each", ((1, 1), (1, 1)), {"sigma": 0.7}),
    Sample("empty batch", ((0, 3, 2), (0, 3, 2)), {"reduction": "sum"}),
)


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about the public function of this op."""
    dispatch.register(
        OpSpec(
            name=NAME,
            function=function,
            backends=BACKENDS,
            samples=SAMPLES,
            bytes=_bytes,
            flops=_flops,
            scratch_bytes=_scratch_bytes,
            raw_ops=(NAME, f"{NAME}_backward"),
        )
    )
