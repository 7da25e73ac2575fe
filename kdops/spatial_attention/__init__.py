"""Spatial attention between two feature maps in memory O(N C): the N x N matrix of weights is never held."""

from __future__ import annotations

from math import prod

from torch import Tensor

from .. import checks, dispatch
from . import spec

__all__ = ["spatial_attention"]

NORMALIZATIONS = ("key", "query")


def spatial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    normalize: str = "key",
    backend: str = "auto",
) -> Tensor:
    r"""Attention of every position of one feature map to every position of another.

    out[b, :, n] = sum_m value[b, :, m] a[b, m, n],   a[b, m, n] = softmax_m(scale * key[b, :, m] . query[b, :, n])

    With normalize="query" the softmax runs over n instead: each position of the key distributes itself over the positions of the query.

    Time O(B Nq Nk (C + Cv)), memory O(B (Nq + Nk) (C + Cv)) with N the number of positions; eager torch holds several B x Nk x Nq matrices.
    Only the gradients that are asked for are computed. Passing one tensor as key and value costs less than passing a copy of it.

    Args:
        query: (B, C, *Sq) with one to three spatial axes, floating point (float32, bfloat16, float16; float64 on the CPU and
            reference backends), any strides.
        key: (B, C, *Sk), same dtype and device as query.
        value: (B, Cv, *Sk), same dtype and device. Under autocast dtypes may differ, and attention runs in the autocast dtype.
        scale: factor of the logits; None is 1 / sqrt(C).
        normalize: "key" (the weights of each position of the query sum to 1) or "query" (those of each position of the key do).
        backend: "auto", "cpu", "triton" (up to 512 channels) or "reference".

    Returns:
        (B, Cv, *Sq), contiguous, in the dtype of query (the autocast dtype under autocast), accumulated in float32 or better.

    Raises:
        TypeError: not floating-point tensors of one dtype, or a scale that is no number.
        ValueError: shapes or devices that do not match, no channels or no positions, an unknown normalize or backend,
            a scale that is not finite.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the cross-network spatial attention of SKD (methods.md 1; normalize="query" is its formula read literally), and scaled
        dot-product attention (Vaswani et al. 2017, eq. 1).
    """
    op = "spatial_attention"
    checks.tensors(op, query=query, key=key, value=value)
    checks.choice(op, "normalize", normalize, NORMALIZATIONS)
    scale = None if scale is None else checks.finite(op, "scale", scale)
    _check_shapes(op, query, key, value)
    shared = value is key
    query, key, value = checks.for_attention(query, key, value)
    run = dispatch.implementation(op, (query, key, value), backend)
    out: Tensor = run(query, key, key if shared else value, scale, normalize == "query")
    return out


def _check_shapes(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    maps = (query, key, value)
    batch, channels = query.shape[:1], query.shape[1:2]
    fit = (
        all(3 <= t.ndim <= 5 for t in maps)
        and key.shape[:2] == (*batch, *channels)
        and value.shape[:1] == batch
        and value.shape[2:] == key.shape[2:]
    )
    if not fit:
        raise ValueError(
            f"{op}: query {checks.describe(query)}, key {checks.describe(key)}, value {checks.describe(value)}, but they must be "
            "(B, C, *Sq), (B, C, *Sk) and (B, Cv, *Sk) with one to three spatial axes."
        )
    if any(0 in (t.shape[1], prod(t.shape[2:])) for t in maps):
        raise ValueError(
            f"{op}: query {checks.describe(query)}, key {checks.describe(key)}, value {checks.describe(value)}, but they must have "
            "at least one channel and one position."
        )


spec.register(spatial_attention)
