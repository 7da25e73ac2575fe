"""Schemas, fakes, autograd, backends, costs and sample inputs of channel attention and its distance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from ..registration import accumulator
from . import reference

CPU = "kdops.channel_attention.cpu"
TRITON = {
    "channel_attention": "kdops.channel_attention.triton",
    "channel_attention_distance": "kdops.channel_attention.triton_distance",
}
MOST_KEPT = 2**19
"""Numbers of the residual that the CPU keeps: of larger maps memory counts, of small ones with many channels the product that forms it."""
NO_DOUBLE_BACKWARD = "attention losses are differentiated once, and kernels have no second formula"


def _fake_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    dtype = accumulator(query)
    return query.new_empty((query.shape[0], heads, query.shape[1] // heads, key.shape[1] // heads), dtype=dtype)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, heads: int
) -> tuple[Tensor, Tensor]:
    value = key if value is None else value
    out = query.new_empty(query.shape[:2] + value.shape[2:])
    return out, _fake_attention(query, key, heads)


def residual_to_keep(target: Tensor) -> Tensor:
    """Where the CPU keeps output - target until backward, (B, Cq, N), unwritten; (0,) above MOST_KEPT numbers."""
    shape = target.flatten(2).shape if prod(target.shape) <= MOST_KEPT else (0,)
    return target.new_empty(shape, dtype=accumulator(target))


def _fake_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attention = _fake_attention(query, key, heads)
    nothing = query.new_empty(0, dtype=torch.int32)
    return query.new_empty(query.shape[0]), attention, residual_to_keep(target), nothing


def _fake_distance_triton(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    distance, attention, _, close = _fake_distance(query, *args)
    return distance, attention, torch.empty_like(attention), close.new_empty(query.shape[0])


def _fake_backward(grad: Tensor, *args: Any, statistics: int, inputs: int) -> tuple[Tensor, ...]:
    """args: `statistics` tensors, `inputs` inputs (the value may be None), options, and one `need` for each input."""
    maps, needs = args[statistics : statistics + inputs], args[-inputs:]
    return tuple(
        torch.empty_like(t) if needed else grad.new_empty(0, dtype=maps[0].dtype)
        for t, needed in zip(maps, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], maps: int) -> None:
    ctx.options = inputs[maps:]
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)  # else every backward pass would launch a fill for each of the statistics
    ctx.save_for_backward(*statistics, *inputs[:maps])


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing depends on the result
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[: -len(ctx.options)]
        gradients = op(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * len(ctx.options)

    return backward


def _declare(
    name: str,
    fake: Callable[..., Any],
    maps: tuple[str, ...],
    options: str,
    statistics: tuple[str, ...],
    triton_fake: Callable[..., Any] | None = None,
) -> None:
    inputs = ", ".join("Tensor? value" if m == "value" else f"Tensor {m}" for m in maps) + f", {options}"
    results = ", ".join("Tensor" for _ in ("result", *statistics))
    registration.define(name, f"({inputs}) -> ({results})", fake, TRITON[name], CPU, triton_fake)
    saved = ", ".join(f"Tensor {s}" for s in statistics)
    needs = ", ".join(f"bool need_{m}" for m in maps)
    gradients = ", ".join("Tensor" for _ in maps)
    schema = f"(Tensor grad, {saved}, {inputs}, {needs}) -> ({gradients})"
    fake_backward = partial(_fake_backward, statistics=len(statistics), inputs=len(maps))
    registration.define(f"{name}_backward", schema, fake_backward, TRITON[name], CPU)
    registration.differentiate(name, partial(_setup_context, maps=len(maps)), _backward, NO_DOUBLE_BACKWARD)


_declare(
    "channel_attention", _fake_forward, ("query", "key", "value"), "float? scale, int heads", statistics=("attention",)
)
# With the residual R = attention @ value - target: a GPU keeps R value^T, and `close` marks the samples whose R is so small beside the
# target that R value^T is to be formed again (kdops/channel_attention/triton.py says why). The CPU keeps a small R itself.
_declare(
    "channel_attention_distance",
    _fake_distance,
    ("query", "key", "value", "target"),
    "float? scale, int heads, bool mean",
    statistics=("attention", "kept", "close"),
    triton_fake=_fake_distance_triton,
)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _size(*tensors: Tensor) -> int:
    return size(*{id(t): t for t in tensors}.values())  # key is value: counted once


def _output(query: Tensor, value: Tensor) -> int:
    return prod(query.shape[:2]) * prod(value.shape[2:]) * query.element_size()


def _bytes(query: Tensor, key: Tensor, value: Tensor, *target: Tensor, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads every input once and writes the output, unless a target is all that sees it. Backward reads its gradient (or the
    # target) and the inputs, and writes the gradients that are asked for.
    maps = (query, key, value, *target)
    out = 0 if target else _output(query, value)
    return (1 + backward) * (_size(*maps) + out) + backward * _size(*(t for t in maps if t.requires_grad))


def _flops(
    query: Tensor, key: Tensor, value: Tensor, *target: Tensor, heads: int = 1, backward: bool = False, **kwargs: Any
) -> int:
    pairs = 2 * query.shape[0] * query.shape[1] * key.shape[1] // heads  # multiply and add for every pair of channels
    at_keys, at_values = pairs * prod(key.shape[2:]), pairs * prod(value.shape[2:])
    forward = at_keys + at_values
    if not backward:
        return forward
    logits = query.requires_grad or key.requires_grad
    # A residual that was not kept is formed twice.
    again = (
        bool(target) and target[0].numel() > MOST_KEPT and (logits or value.requires_grad or target[0].requires_grad)
    )
    return (
        forward
        + at_values * (again + logits + value.requires_grad)
        + at_keys * (query.requires_grad + key.requires_grad)
    )


def _scratch_bytes(
    query: Tensor, key: Tensor, *others: Tensor, heads: int = 1, backward: bool = False, **kwargs: Any
) -> int:
    # C x C matrices: the attention, packed, sums over chunks of positions; in backward three more. With a target a GPU sums up three
    # Grams, and that of the residual for samples close to it; a CPU keeps a small residual. And three packed tiles a thread.
    matrix = query.shape[0] * query.shape[1] * key.shape[1] // heads * max(4, query.element_size())
    sums = min(32, prod(query.shape[2:]) // 1024 + 1) * (4 if len(others) > 1 else 1)
    number = max(4, query.element_size())
    kept = residual_to_keep(others[1]).numel() if len(others) > 1 else 0
    return (2 + sums + 3 * backward) * matrix + (kept + 3 * 2**16 * torch.get_num_threads()) * number


# --- backends and samples --------------------------------------------------------------------------------------------------------


def _first(op: registration.Op) -> Callable[..., Tensor]:
    """`op` without its second result, the attention that backward needs."""

    def call(*args: Any) -> Tensor:
        out: Tensor = op(*args)[0]
        return out

    return call


def _shapes(b: int, cq: int, ck: int, *s: int) -> tuple[tuple[int, ...], ...]:
    return ((b, cq, *s), (b, ck, *s), (b, ck, *s))


_SAMPLES = (
    Sample("cross", _shapes(2, 6, 4, 5, 7)),
    Sample("heads", _shapes(2, 6, 4, 4, 4), {"heads": 2}),
    Sample("prime", _shapes(3, 11, 5, 13)),
    Sample("one of each", _shapes(1, 1, 1, 1)),
    Sample("value of other positions", ((2, 3, 4, 5), (2, 5, 2, 10), (2, 5, 7))),
    Sample("wide", _shapes(1, 24, 32, 7, 11), {"heads": 4}),
    Sample("empty batch", _shapes(0, 4, 4, 3, 2)),
)


def _with_target(sample: Sample) -> Sample:
    query, _, value = sample.shapes
    kwargs = {**sample.kwargs, **({"statistic": "sum"} if "heads" in sample.kwargs else {})}
    return Sample(sample.name, (*sample.shapes, query[:2] + value[2:]), kwargs)


def register(function: Callable[..., Any]) -> None:
    """Tell dispatch and the contract tests about one public function of this op."""
    name = function.__name__
    distance = name == "channel_attention_distance"
    dispatch.register(
        OpSpec(
            name=name,
            function=function,
            backends=(
                Backend("cpu", _first(registration.op(name)), dispatch.supports_cpu),
                Backend("triton", _first(registration.op(name, "_triton")), dispatch.supports_triton),
                Backend("reference", getattr(reference, name), dispatch.supports_reference),
            ),
            samples=tuple(map(_with_target, _SAMPLES)) if distance else _SAMPLES,
            bytes=_bytes,
            flops=_flops,
            scratch_bytes=_scratch_bytes,
            raw_ops=(name, f"{name}_backward"),
            no_double_backward=NO_DOUBLE_BACKWARD,
            autocast="float32" if distance else "autocast",
        )
    )
