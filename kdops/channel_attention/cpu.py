"""Channel attention on the CPU: products with feature maps and softmaxes of the C x C logits in C++ (csrc/channel_attention.cpp).

The C x C attention is kept for the backward pass: it is small beside the maps, and making it again would read query and key again.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..layout import GradientColumns
from ..registration import LIBRARY, op
from .spec import residual_to_keep

# Maps are (B, C, N) of any strides and one dtype; matrices (B, heads, rows, columns) in the dtype of sums.
LIBRARY.define("channel_gram(Tensor x, Tensor y, int heads) -> Tensor")
LIBRARY.define("channel_mix(Tensor(a!) out, Tensor matrix, Tensor x, bool onto) -> ()")
LIBRARY.define("channel_residual(Tensor attention, Tensor value, Tensor target, Tensor(a!)? residual) -> Tensor")
LIBRARY.define(
    "channel_residual_backward(Tensor attention, Tensor? residual, Tensor slope, Tensor value, Tensor target, bool need_attention, "
    "Tensor(a!)? of_value, Tensor(b!)? of_target) -> Tensor"
)
LIBRARY.define("channel_softmax(Tensor(a!) logits, float scale) -> ()")
LIBRARY.define("channel_softmax_backward(Tensor(a!) of_attention, Tensor attention, float scale, Tensor? factor) -> ()")


def gram(x: Tensor, y: Tensor) -> Tensor:
    """(B, Cx, N), (B, Cy, N) -> x y^T (B, Cx, Cy)."""
    product: Tensor = op("channel_gram")(x, y, 1)
    return product.squeeze(1)


def mixed(first: Tensor, x: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """first x + second y, of matrices (B, C, Cx) and (B, C, Cy) and maps (B, Cx, N) and (B, Cy, N) -> (B, C, N)."""
    out = x.new_empty(first.shape[:2] + x.shape[2:])
    op("channel_mix")(out, first.unsqueeze(1), x, False)
    op("channel_mix")(out, second.unsqueeze(1), y, True)
    return out


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, heads: int
) -> tuple[Tensor, Tensor]:
    """-> out (B, Cq, *S), attention (B, heads, Cq / heads, Ck / heads)."""
    value = key if value is None else value
    attention = _attention(query, key, scale, heads)
    out = query.new_empty(query.shape[:2] + value.shape[2:])
    op("channel_mix")(out.flatten(2), attention, value.flatten(2), False)
    return out, attention


def channel_attention_backward(
    grad: Tensor,
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float | None,
    heads: int,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; where the value is the key (None), the key's holds both."""
    shared, value = value is None, key if value is None else value
    upstream = grad.flatten(2)
    of_query, of_key = GradientColumns(query, need_query), GradientColumns(key, need_key)
    of_value = GradientColumns(value, need_value)
    as_value = of_key if shared else of_value
    if as_value.needed:
        op("channel_mix")(as_value.columns, attention.mT, upstream, False)
    if need_query or need_key:
        of_attention = op("channel_gram")(upstream, value.flatten(2), heads)
        _through_logits(of_attention, None, attention, query, key, scale, of_query, of_key, onto_key=shared)
    return of_query.finish(), of_key.finish(), of_value.finish()


def channel_attention_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> distance (B,), attention (B, heads, Cq / heads, Ck / heads); a small residual, and nothing."""
    attention = _attention(query, key, scale, heads)
    value = key if value is None else value
    residual = residual_to_keep(target)
    distance = op("channel_residual")(attention, value.flatten(2), target.flatten(2), _given(residual))
    if mean:
        distance = distance / prod(target.shape[1:])
    return distance.to(query.dtype), attention, residual, query.new_empty(0, dtype=torch.int32)


def channel_attention_distance_backward(
    grad: Tensor,
    attention: Tensor,
    residual: Tensor,
    _close: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    target: Tensor,
    scale: float | None,
    heads: int,
    mean: bool,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and target, by one sweep that forms the residual again where it was not kept."""
    shared, value = value is None, key if value is None else value
    of_query, of_key = GradientColumns(query, need_query), GradientColumns(key, need_key)
    of_value, of_target = GradientColumns(value, need_value), GradientColumns(target, need_target)
    as_value = of_key if shared else of_value
    slope = grad.to(attention.dtype) * (2 / prod(target.shape[1:]) if mean else 2)  # of the square
    of_attention = op("channel_residual_backward")(
        attention,
        _given(residual),
        slope,
        value.flatten(2),
        target.flatten(2),
        need_query or need_key,
        as_value.columns if as_value.needed else None,
        of_target.columns if need_target else None,
    )
    if need_query or need_key:
        _through_logits(of_attention, slope, attention, query, key, scale, of_query, of_key, onto_key=shared)
    return of_query.finish(), of_key.finish(), of_value.finish(), of_target.finish()


def _given(residual: Tensor) -> Tensor | None:
    return residual if residual.numel() else None


def _factor(query: Tensor, scale: float | None) -> float:
    return prod(query.shape[2:]) ** -0.5 if scale is None else scale


def _attention(query: Tensor, key: Tensor, scale: float | None, heads: int) -> Tensor:
    logits: Tensor = op("channel_gram")(query.flatten(2), key.flatten(2), heads)
    op("channel_softmax")(logits, _factor(query, scale))
    return logits


def _through_logits(
    of_attention: Tensor,
    slope: Tensor | None,
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    of_query: GradientColumns,
    of_key: GradientColumns,
    *,
    onto_key: bool,
) -> None:
    """From the gradient of the attention, times `slope` (B,), to those of query and key; `onto_key` adds to what the key's holds."""
    op("channel_softmax_backward")(of_attention, attention, _factor(query, scale), slope)
    of_logits = of_attention
    if of_query.needed:
        op("channel_mix")(of_query.columns, of_logits, key.flatten(2), False)
    if of_key.needed:
        op("channel_mix")(of_key.columns, of_logits.mT, query.flatten(2), onto_key)
