"""The definition of channel attention, in eager torch: oracle of the tests and portable fallback."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..registration import accumulator


def channel_attention(query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, heads: int) -> Tensor:
    """query (B, Cq, *Sq), key (B, Ck, *Sk), value (B, Ck, *S) or None (it is the key) -> (B, Cq, *S)."""
    value = key if value is None else value
    q, k, v = (_by_heads(t, heads) for t in (query, key, value))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    out: Tensor = logits.softmax(dim=-1) @ v
    return out.reshape(query.shape[:2] + value.shape[2:])


def channel_attention_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int, mean: bool
) -> Tensor:
    """As above, target (B, Cq, *S) -> (B,): mean or sum over a sample of (attention - target)^2."""
    wide = accumulator(query)  # sums of squares overflow in float16
    residual = channel_attention(query, key, value, scale, heads).to(wide) - target.to(wide)
    distance = residual.flatten(1).square().sum(dim=1)
    return (distance / prod(target.shape[1:]) if mean else distance).to(query.dtype)


def _by_heads(maps: Tensor, heads: int) -> Tensor:
    """(B, heads, C / heads, N). One reshape: of flatten and unflatten, torch 2.13's compiler gives a gradient of the wrong shape."""
    return maps.reshape(maps.shape[0], heads, maps.shape[1] // heads, prod(maps.shape[2:]))
