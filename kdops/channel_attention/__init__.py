"""Channel attention (C x C) between networks, and its squared distance to a target without keeping the output."""

from __future__ import annotations

from math import prod

from torch import Tensor

from .. import checks, dispatch
from . import spec

__all__ = ["channel_attention", "channel_attention_distance"]


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, heads: int = 1, backend: str = "auto"
) -> Tensor:
    r"""Attention between channels: every channel of the query gathers the channels of the value.

    out[b, c, :] = sum_d softmax_d(scale * query[b, c, :] . key[b, d, :]) value[b, d, :],   per head

    Channels are split into `heads` groups of consecutive channels, and group h of the query sees group h of key and value.
    Time O(B N Cq Ck / heads), memory O(B Cq Ck / heads) besides inputs, output and gradients. Pass one tensor as key and value
    (`key is value`) to have their gradients accumulated in one buffer.

    Args:
        query: (B, Cq, *spatial) of N positions in one to three axes, float32, bfloat16 or float16 (float64 on the CPU and reference
            backends), any strides.
        key: (B, Ck, *spatial) of N positions too. Same dtype and device as the query; under autocast dtypes may differ and the
            attention runs in the autocast dtype.
        value: (B, Ck, *S), whose spatial axes may differ from the key's.
        scale: factor of the logits, 1 / sqrt(N) by default.
        heads: divides Cq and Ck.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        (B, Cq, *S) in the dtype of the query, contiguous. Products accumulate in float32 or better.

    Raises:
        TypeError: not floating-point tensors of one dtype, a scale that is no number, or heads that are no whole number.
        ValueError: shapes or devices that do not match, no channels or positions, heads that do not divide the channels, a scale that is
            not finite, an unknown backend.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the channel branch of SKD, softmax(T S^T / lambda) S (methods.md 1a, our reading of the axis); Restormer's transposed attention.
    """
    op = "channel_attention"
    checks.tensors(op, query=query, key=key, value=value)
    scale, heads = _check_options(op, scale, heads)
    _check_shapes(op, query, key, value, heads)
    shared = value is key
    query, key, value = checks.for_attention(query, key, value)
    run = dispatch.implementation(op, (query, key, value), backend)
    out: Tensor = run(query, key, None if shared else value, scale, heads)
    return out


def channel_attention_distance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    *,
    scale: float | None = None,
    heads: int = 1,
    statistic: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Squared distance between channel attention and a target, per sample, without keeping the attention's output.

    d[b] = mean or sum over channels and positions of (channel_attention(query, key, value)[b] - target[b])^2

    Time O(B N Cq Ck / heads), memory O(B Cq Ck / heads) and a tile besides inputs and gradients. On a CPU the output is formed
    tile by tile and subtracted there, and again in backward; only a difference of at most 2^19 numbers is kept. On a GPU the distance
    follows from C x C Gram matrices, and the output is formed (in tiles too) only for samples whose distance is below 1/32 of their
    target's square, where Grams would cancel. Either way a student near its target is measured as exactly as one far away.

    Args:
        query, key, value, scale, heads, backend: as channel_attention. Under autocast everything runs in float32.
        target: (B, Cq, *S), same dtype and device.
        statistic: "mean" divides by the number of elements of a sample's target, "sum" does not.

    Returns:
        (B,) in the dtype of the query (float32 under autocast), accumulated in float32 or better.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as channel_attention; ValueError also for an unknown statistic.

    Source: SKD's channel loss ||softmax(T S^T / lambda) S - T||^2 (methods.md 1a).
    """
    op = "channel_attention_distance"
    checks.tensors(op, query=query, key=key, value=value, target=target)
    checks.choice(op, "statistic", statistic, checks.STATISTICS)
    scale, heads = _check_options(op, scale, heads)
    _check_shapes(op, query, key, value, heads)
    if target.shape != query.shape[:2] + value.shape[2:]:
        raise ValueError(
            f"{op}: target {checks.describe(target)}, but it must have the channels of query {checks.describe(query)} "
            f"and the positions of value {checks.describe(value)}."
        )
    shared = value is key
    query, key, value, target = checks.for_distance(query, key, value, target)
    run = dispatch.implementation(op, (query, key, value, target), backend)
    distance: Tensor = run(query, key, None if shared else value, target, scale, heads, statistic == "mean")
    return distance


def _check_options(op: str, scale: object, heads: object) -> tuple[float | None, int]:
    return None if scale is None else checks.finite(op, "scale", scale), checks.whole(op, "heads", heads)


def _check_shapes(op: str, query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    maps = (query, key, value)
    fits = (
        all(3 <= t.ndim <= 5 and t.shape[0] == query.shape[0] for t in maps)
        and prod(query.shape[2:]) == prod(key.shape[2:])
        and key.shape[1] == value.shape[1]
    )
    if not fits:
        raise ValueError(
            f"{op}: query {checks.describe(query)}, key {checks.describe(key)}, value {checks.describe(value)}, but they must be "
            "(B, Cq, *spatial), (B, Ck, *spatial) of as many positions and (B, Ck, *S), with one to three spatial axes."
        )
    if any(prod(t.shape[1:]) == 0 for t in maps):
        raise ValueError(
            f"{op}: query {checks.describe(query)}, key {checks.describe(key)}, value {checks.describe(value)}, "
            "but they must be of at least one channel and one position."
        )
    if heads < 1 or query.shape[1] % heads or key.shape[1] % heads:
        raise ValueError(
            f"{op}: heads is {heads}, but it must be a number above 0 that divides the channels of query {query.shape[1]} "
            f"and key {key.shape[1]}."
        )


for _function in (channel_attention, channel_attention_distance):
    spec.register(_function)
