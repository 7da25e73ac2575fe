"""Schemas, fakes, autograd, backends, costs and sample inputs of the natural-scene statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from . import blocks, brisque, reference

NAME = "mscn"
TRITON = "kdops.nss.triton"
NO_DOUBLE_BACKWARD = "a distillation loss is differentiated once"
NO_GRADIENT = {
    "piqe": "it rounds the image and counts blocks, a step function: match block_variance and edge_deviations instead"
}


def _fake_mscn(image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), image.new_empty(image.shape)


def _fake_backward(
    grad_normalised: Tensor | None,
    grad_std: Tensor | None,
    image: Tensor,
    normalised: Tensor,
    std: Tensor,
    window: int,
    sigma: float,
    c: float,
    replicate: bool,
) -> Tensor:
    return torch.empty_like(image)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, *ctx.options = inputs
    # The results say what the windows' statistics are, unless they are rounded to 16 bits.
    precise = image.dtype == registration.accumulator(image)
    ctx.save_for_backward(image, *(output if precise else ()))
    ctx.set_materialize_grads(False)


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        image, *results = ctx.saved_tensors
        if not results:
            wide = image.float()
            results = registration.forward_of(op)(wide, *ctx.options)
            upstream = (grad if grad is None else grad.float() for grad in grads)
            return op(*upstream, wide, *results, *ctx.options).to(image.dtype), None, None, None, None
        return op(*grads, image, *results, *ctx.options), None, None, None, None

    return backward


_OPTIONS = "int window, float sigma, float c, bool replicate"
_RESULTS = "Tensor normalised, Tensor std"
registration.define(NAME, f"(Tensor image, {_OPTIONS}) -> (Tensor, Tensor)", _fake_mscn, TRITON)
registration.define(
    f"{NAME}_backward",
    f"(Tensor? grad_normalised, Tensor? grad_std, Tensor image, {_RESULTS}, {_OPTIONS}) -> Tensor",
    _fake_backward,
    TRITON,
)
registration.differentiate(NAME, _setup_context, _backward, NO_DOUBLE_BACKWARD)


# --- costs -----------------------------------------------------------------------------------------------------------------------

PIXELS_OF_SCALES = 1.25  # of an image and its half


def _bytes(image: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads the image and writes two maps; backward reads it again and two gradients, and writes one.
    return size(image) * (3 + 4 * (backward and image.requires_grad))


def _flops(image: Tensor, *, window: int = 7, backward: bool = False, **kwargs: Any) -> int:
    # Per tap: a mean (3 of a row, 4 of a column) and a variance (5 and 6); the way back 8 of a column and 5 of a row.
    return image.numel() * window * (18 + 13 * (backward and image.requires_grad))


def _scratch_bytes(image: Tensor, **kwargs: Any) -> int:
    return 2**20  # tiles that stay in cache


def _bytes_of_features(image: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    return size(image) * (1 + 2 * (backward and image.requires_grad))  # moments need no map in memory


def _flops_of_features(image: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    moments = 5 * 6 * image.numel() * (1 + backward)  # of the image and its four products
    return int(PIXELS_OF_SCALES * (_flops(image, backward=backward) + moments))


def _scratch_of_features(image: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # The moments are plain torch, in float64: the map, its products, and squares, absolute values and masks of all of them, of which
    # the graph holds the most at once.
    maps = 2 * 4 + 8 * (5 + (20 if backward else 10))
    return int(PIXELS_OF_SCALES * image.numel() * maps) + 2**20


# --- backends and samples --------------------------------------------------------------------------------------------------------


_BLOCKS = (
    Sample("square", ((1, 1, 16, 32),)),
    Sample("prime", ((1, 1, 13, 11),)),
    Sample("one pixel", ((1, 1, 1, 1),)),
    Sample("empty batch", ((0, 1, 20, 16),)),
)
# Small, because the interpreter of Triton is slow; tests/ops has larger ones.
SAMPLES = {
    NAME: (
        Sample("square", ((2, 1, 4, 4),), {"window": 3}),
        Sample("usual window, replicate", ((1, 2, 4, 11),), {"padding": "replicate", "c": 0.5}),
        Sample("prime", ((1, 1, 7, 13),), {"window": 5, "sigma": 0.8}),
        Sample("one pixel", ((1, 1, 1, 1),), {"window": 3}),
        Sample("window beyond the image", ((1, 1, 3, 2),), {"window": 5, "sigma": 3.0, "padding": "replicate"}),
        Sample("window of one", ((1, 2, 4, 5),), {"window": 1}),
        Sample("empty batch", ((0, 2, 8, 8),)),
    ),
    "brisque_features": (Sample("prime", ((2, 1, 4, 13),)), *_BLOCKS[2:]),
    "piqe": _BLOCKS,
}

OPERATORS: dict[str, brisque.Mscn] = {
    "cpu": registration.op(NAME),
    "cuda": registration.op(NAME),
    "triton": registration.op(NAME, "_triton"),
    "reference": reference.mscn,
}
SUPPORTS = {
    "cpu": dispatch.supports_cpu,
    "cuda": dispatch.supports_cuda,
    "triton": dispatch.supports_triton,
    "reference": dispatch.supports_reference,
}


def _composed(statistics: Callable[[Tensor, brisque.Mscn], Any], mscn: brisque.Mscn) -> Callable[[Tensor], Any]:
    """Statistics of the normalised image that one backend makes."""

    def run(image: Tensor) -> Any:
        return statistics(image, mscn)

    return run


def _run(name: str, backend: str) -> Callable[..., Any]:
    if name == NAME:
        return OPERATORS[backend]
    return _composed(brisque.features if name == "brisque_features" else blocks.scores, OPERATORS[backend])


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about one public function of this op."""
    name = function.__name__
    dispatch.register(
        OpSpec(
            name=name,
            function=function,
            backends=tuple(Backend(b, _run(name, b), SUPPORTS[b]) for b in dispatch.BACKENDS),
            samples=SAMPLES[name],
            bytes=_bytes if name == NAME else _bytes_of_features,
            flops=_flops if name == NAME else _flops_of_features,
            scratch_bytes=_scratch_bytes if name == NAME else _scratch_of_features,
            raw_ops=(NAME, f"{NAME}_backward"),
            no_double_backward=NO_DOUBLE_BACKWARD,
            no_gradient=NO_GRADIENT.get(name),
            preference=dispatch.CUDA_FIRST,
        )
    )
