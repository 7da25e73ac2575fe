"""Schemas, fakes, autograd, backends, costs and sample inputs of spatial attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor

from .. import dispatch, registration
from ..dispatch import Backend, OpSpec, Sample, size
from ..registration import accumulator, gradient_like
from . import reference

TRITON = "kdops.spatial_attention.triton"
MOST_CHANNELS = 512  # of the Triton kernels: a program holds all of them
NO_DOUBLE_BACKWARD = (
    "its kernels recompute the weights instead of keeping them, and have no formula for the second derivative"
)

FORWARD = "(Tensor query, Tensor key, Tensor? value, float? scale, bool over_query) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    "(Tensor grad, Tensor query, Tensor key, Tensor? value, Tensor out, Tensor statistics, Tensor logits, float? scale, "
    "bool over_query, bool need_query, bool need_key, bool need_value) -> (Tensor, Tensor, Tensor)"
)


def kept_logits(query: Tensor, key: Tensor) -> int:
    """How many numbers of logits forward on the CPU keeps for backward: all, where they are fewer than query and key have.

    They then cost less to keep than to make again, and memory stays O(N C). Blocks of 6 x 16, as the kernel works on them.
    """
    rows, columns = prod(query.shape[2:]), prod(key.shape[2:])
    keep = rows * columns <= (rows + columns) * query.shape[1]
    return query.shape[0] * -(-rows // 6) * -(-columns // 16) * 96 if keep else 0


def _fake_triton(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, over_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; of every softmax the highest logit and the logarithm of the sum relative to it, side by side; and no logits."""
    channels = (key if value is None else value).shape[1]
    positions = prod((key if over_query else query).shape[2:])
    dtype = accumulator(query)
    out = query.new_empty((query.shape[0], channels, *query.shape[2:]))
    return out, query.new_empty((query.shape[0], positions, 2), dtype=dtype), query.new_empty(0, dtype=dtype)


def _fake_cpu(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, over_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, all highest logits before the logarithms, and the logits where they are kept."""
    out, pairs, _ = _fake_triton(query, key, value, scale, over_query)
    statistics = pairs.new_empty((pairs.shape[0], 2, pairs.shape[1]))
    return out, statistics, statistics.new_empty(kept_logits(query, key))


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    logits: Tensor,
    scale: float | None,
    over_query: bool,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients; where value is None, the key's includes that of its role as value."""
    return (
        gradient_like(query, need_query),
        gradient_like(key, need_key),
        gradient_like(key if value is None else value, need_value),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float | None, bool], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, ctx.scale, ctx.over_query = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, value, *output)


def _backward(op: registration.Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        grads = op(grad, *ctx.saved_tensors, ctx.scale, ctx.over_query, *need)
        return (*(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None)

    return backward


registration.define("spatial_attention", FORWARD, _fake_cpu, TRITON, triton_fake=_fake_triton)
registration.define("spatial_attention_backward", BACKWARD, _fake_backward, TRITON)
registration.differentiate("spatial_attention", _setup_context, _backward, NO_DOUBLE_BACKWARD)


# --- costs -----------------------------------------------------------------------------------------------------------------------


def _out_size(query: Tensor, value: Tensor) -> int:
    return query.shape[0] * value.shape[1] * prod(query.shape[2:]) * query.element_size()


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (query, key) if value is key else (query, key, value)


def _bytes(query: Tensor, key: Tensor, value: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # Forward reads the inputs and writes the result; backward reads both and the upstream gradient, and writes the gradients asked for.
    given, out = _inputs(query, key, value), _out_size(query, value)
    wanted = [t for t in given if t.requires_grad]
    return size(*given) + out + backward * (size(*given, *wanted) + 2 * out)


def _flops(
    query: Tensor, key: Tensor, value: Tensor, *, normalize: str = "key", backward: bool = False, **kwargs: Any
) -> int:
    # One product is Nk x Nq x its channels. Forward: logits, result; over the query the logits once more, for their sums.
    pairs = 2 * query.shape[0] * prod(query.shape[2:]) * prod(key.shape[2:])
    c, cv = query.shape[1], value.shape[1]
    over_query = normalize == "query"
    total = pairs * (c + cv + over_query * c)
    if backward:
        slopes = query.requires_grad or key.requires_grad  # the gradient of the logits
        total += pairs * (c + slopes * cv + c * (query.requires_grad + key.requires_grad))
        total += pairs * (cv * (value.requires_grad or (slopes and over_query)) + slopes * over_query * c)
    return total


def _scratch_bytes(query: Tensor, key: Tensor, value: Tensor, *, backward: bool = False, **kwargs: Any) -> int:
    # On the CPU: packed copies of the inputs (two of the key), and in backward of the upstream gradient; there the query's gradient is
    # summed apart in at most 16 tasks for the whole batch, each of at least 128 positions of the key. And the logits, where they are kept.
    logits = kept_logits(query, key) * max(4, query.element_size())
    if not backward:
        return size(query, key, value) + logits
    groups = min(max(16 // max(query.shape[0], 1), 1), -(-prod(key.shape[2:]) // 128))
    return (
        size(query, key, *_inputs(query, key, value)[1:])
        + _out_size(query, value)
        + groups * query.requires_grad * size(query)
        + logits
    )


# --- backends and samples --------------------------------------------------------------------------------------------------------


def _kernel(op: registration.Op) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, scale: float | None, over_query: bool) -> Tensor:
        # The same tensor twice is said by None: it is read once, and its two gradients share one accumulator.
        out: Tensor = op(query, key, None if value is key else value, scale, over_query)[0]
        return out

    return run


def _supports_triton(tensors: Sequence[Tensor]) -> str | None:
    # A shape, by exception: it makes torch.compile start over only for maps on the other side of the bound.
    reason = dispatch.supports_triton(tensors)
    too_many = next((c for t in tensors for c in t.shape[1:2] if c > MOST_CHANNELS), None)
    if reason is None and too_many is not None:
        reason = f"a tensor has {too_many} channels and the Triton kernels take at most {MOST_CHANNELS}"
    return reason


BACKENDS = (
    Backend("cpu", _kernel(registration.op("spatial_attention")), dispatch.supports_cpu),
    Backend("triton", _kernel(registration.op("spatial_attention", "_triton")), _supports_triton),
    Backend("reference", reference.spatial_attention, dispatch.supports_reference),
)

SAMPLES = (
    Sample("image", ((2, 7, 5, 8), (2, 7, 4, 9), (2, 3, 4, 9))),
    Sample("over the query", ((2, 7, 5, 8), (2, 7, 4, 9), (2, 3, 4, 9)), {"normalize": "query"}),
    Sample("sharp, prime", ((1, 13, 101), (1, 13, 67), (1, 17, 67)), {"scale": 1.5}),
    Sample("several tiles", ((1, 3, 13, 10), (1, 3, 43, 3), (1, 2, 43, 3))),
    Sample("volume", ((1, 2, 2, 3, 4), (1, 2, 3, 2, 2), (1, 2, 3, 2, 2)), {"scale": 0.5, "normalize": "query"}),
    Sample("few positions", ((2, 24, 19), (2, 24, 21), (2, 5, 21))),
    Sample("one of each", ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    Sample("empty batch", ((0, 4, 6), (0, 4, 5), (0, 3, 5))),
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
            raw_ops=("spatial_attention", "spatial_attention_backward"),
            no_double_backward=NO_DOUBLE_BACKWARD,
            autocast="autocast",
        )
    )
