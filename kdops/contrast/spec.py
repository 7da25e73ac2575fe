"""Schemas, fakes, autograd, backends, costs and sample inputs of the contrastive distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from ..registration import accumulator, gradient_like
from . import reference

TRITON = "kdops.contrast.triton"
NO_DOUBLE_BACKWARD = (
    "a contrastive loss is differentiated once, and the second derivative of p=1 is zero almost everywhere"
)


def _fake_distance(x: Tensor, y: Tensor | None, p: int) -> Tensor:
    return x.new_empty((x.shape[0], (x if y is None else y).shape[0]), dtype=accumulator(x))


def _fake_matched(anchor: Tensor, others: Tensor, p: int) -> Tensor:
    return anchor.new_empty(others.shape[:2], dtype=accumulator(anchor))


def _fake_backward(
    grad: Tensor, a: Tensor, b: Tensor | None, p: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return gradient_like(a, need_a), gradient_like(a if b is None else b, need_b)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, int], output: Tensor) -> None:
    a, b, ctx.p = inputs
    ctx.save_for_backward(a, b)


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_a, need_b = ctx.needs_input_grad[:2]
        a, b = ctx.saved_tensors
        if b is None:  # a distance of the rows of a to one another: each pair is in the table twice, with one gradient
            grad = grad + grad.t()
        grad_a, grad_b = op(grad, a, b, ctx.p, need_a, need_b)
        return grad_a if need_a else None, grad_b if need_b else None, None

    return backward


# Pairwise distances without y are those of x to itself: each pair is computed once, and `grad` of backward is the sum of both its places.
for _name, _first, _second, _type, _fake in (
    ("pairwise_distance", "x", "y", "Tensor?", _fake_distance),
    ("matched_distance", "anchor", "others", "Tensor", _fake_matched),
):
    registration.define(_name, f"(Tensor {_first}, {_type} {_second}, int p) -> Tensor", _fake, TRITON)
    registration.define(
        f"{_name}_backward",
        f"(Tensor grad, Tensor {_first}, {_type} {_second}, int p, bool need_{_first}, bool need_{_second}) -> (Tensor, Tensor)",
        _fake_backward,
        TRITON,
    )
    registration.differentiate(_name, _setup_context, _backward, NO_DOUBLE_BACKWARD)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _bytes(*given: Tensor, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads every input once; backward reads them again and writes the gradients that are asked for.
    tensors = given[:1] if given[-1] is given[0] else given
    wanted = [t for t in tensors if t.requires_grad]
    return size(*tensors) + backward * (size(*tensors) + size(*wanted))


def _pair_flops(a: Tensor, b: Tensor, backward: bool) -> int:
    pairs = b.numel() if b.ndim > a.ndim else b.shape[0] * a.numel()  # (B, K, *F) in number
    if b is a:
        pairs = (pairs + a.numel()) // 2
    # Forward: subtract, accumulate |.| (the sign is free). Backward: subtract, then select the weighted sign and accumulate, per gradient.
    return pairs * (2 + backward * (1 + 2 * (a.requires_grad + b.requires_grad)))


def _flops(anchor: Tensor, *others: Tensor, backward: bool = False, **kwargs: Any) -> int:
    if len(others) == 1:
        return _pair_flops(anchor, others[0], backward)
    positive, negatives = others
    return _pair_flops(anchor, positive.unsqueeze(1), backward) + _pair_flops(anchor, negatives, backward)


def _scratch_bytes(anchor: Tensor, *others: Tensor, backward: bool = False, **kwargs: Any) -> int:
    # Kernels keep their tiles in cache. The ratio adds the two gradients of the anchor, for which autograd holds both.
    return size(anchor) if len(others) > 1 and backward and anchor.requires_grad else 0


# --- backends and samples --------------------------------------------------------------------------------------------------------

Distance = Callable[[Tensor, Tensor, int], Tensor]


def _pairwise(op: registration.Op) -> Distance:
    def distance(x: Tensor, y: Tensor, p: int) -> Tensor:
        result: Tensor = op(x, None if y is x else y, p)
        return result

    return distance


def _shared_or_own(pairwise: Distance, matched: Distance) -> Distance:
    """One distance for both kinds of negatives: others of one more axis than the anchor are the anchor's own."""

    def distance(anchor: Tensor, others: Tensor, p: int) -> Tensor:
        return (matched if others.ndim > anchor.ndim else pairwise)(anchor, others, p)

    return distance


DISTANCES: dict[str, dict[str, Distance]] = {
    function: {
        "cpu": given(registration.op(function)),
        "cuda": given(registration.op(function)),
        "triton": given(registration.op(function, "_triton")),
        "reference": getattr(reference, function),
    }
    for function, given in (("pairwise_distance", _pairwise), ("matched_distance", lambda op: op))
}
DISTANCES["contrastive_ratio"] = {
    backend: _shared_or_own(DISTANCES["pairwise_distance"][backend], DISTANCES["matched_distance"][backend])
    for backend in dispatch.BACKENDS
}

SUPPORTS = {
    "cpu": dispatch.supports_cpu,
    "cuda": dispatch.supports_cuda,
    "triton": dispatch.supports_triton,
    "reference": dispatch.supports_reference,
}


def _pair(b: int, k: int, *f: int, own: bool) -> tuple[tuple[int, ...], ...]:
    return ((b, *f), (b, k, *f) if own else (k, *f))


def _distance_samples(own: bool) -> tuple[Sample, ...]:
    return (
        Sample("square p=1", _pair(4, 4, 8, 5, 5, own=own)),
        Sample("square p=2 sum", _pair(4, 4, 8, 5, 5, own=own), {"p": 2, "statistic": "sum"}),
        Sample("prime", _pair(3, 5, 7, 11, 13, own=own), {"p": 1}),
        Sample("whole tiles", _pair(6, 17, 4, 8, own=own), {"p": 1}),
        Sample("one of each", _pair(1, 1, 1, own=own), {"p": 2}),
        Sample("long rows", _pair(2, 3, 3001, own=own), {"p": 1, "statistic": "sum"}),
        Sample("no negatives", _pair(2, 0, 4, 3, own=own), {"p": 1, "statistic": "sum"}),
        Sample("empty batch", _pair(0, 3, 4, 3, own=own), {"p": 2, "statistic": "sum"}),
    )


_RATIO_SAMPLES = (
    Sample("shared", ((3, 4, 5, 13), (3, 4, 5, 13), (5, 4, 5, 13))),
    Sample("one of each", ((1, 1), (1, 1), (1, 1)), {"eps": 1e-3}),
    Sample("empty batch", ((0, 3, 2), (0, 3, 2), (4, 3, 2)), {"reduction": "sum"}),
    Sample("own p=2", ((2, 3, 7), (2, 3, 7), (2, 4, 3, 7)), {"p": 2, "reduction": "none"}),
    Sample(
        "masked, one row without negatives",
        ((3, 4, 5), (3, 4, 5), (3, 4, 5)),
        {"mask": torch.tensor([[False, True, True], [False, False, False], [True, True, False]]), "reduction": "sum"},
    ),
)


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about one public function of this op."""
    name = function.__name__
    ratio = name == "contrastive_ratio"
    raw = ("pairwise_distance", "matched_distance") if ratio else (name,)
    dispatch.register(
        OpSpec(
            name=name,
            function=function,
            backends=tuple(Backend(b, DISTANCES[name][b], SUPPORTS[b]) for b in dispatch.BACKENDS),
            samples=_RATIO_SAMPLES if ratio else _distance_samples(own=name == "matched_distance"),
            bytes=_bytes,
            flops=_flops,
            scratch_bytes=_scratch_bytes,
            raw_ops=tuple(op for r in raw for op in (r, f"{r}_backward")),
            no_double_backward=NO_DOUBLE_BACKWARD,
            preference=dispatch.CUDA_FIRST,
        )
    )
