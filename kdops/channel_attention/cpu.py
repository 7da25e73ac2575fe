"""Channel attention on the CPU: matrix products by torch (MKL), by tiles of columns where a second step finds them in cache.

Maps are read as (B, heads, C / heads, N) views, so channels-first and channels_last go into the products as they lie in memory.
The C x C attention is kept for the backward pass: it is small beside the maps, and making it again would read query and key again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..difference import difference_
from ..layout import GradientColumns

TILE = 2**18  # numbers of a map in a tile: 1 MiB in float32, for the L2 caches of two cores
NARROWEST = 256  # columns of a tile

Index = tuple[
    Any, ...
]  # of a (B, heads, C / heads, N) view: gives a stack of matrices; its first two entries do so for (B, heads, C, C)


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, heads: int
) -> tuple[Tensor, Tensor]:
    """-> out (B, Cq, *S), attention (B, heads, Cq / heads, Ck / heads)."""
    value = key if value is None else value
    attention = _attention(query, key, scale, heads)
    out = query.new_empty(query.shape[:2] + value.shape[2:])
    _multiply(attention, _matrices(value, heads), _matrices(out, heads))
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
    upstream, values = _matrices(grad, heads), _matrices(value, heads)
    of_query, of_key = GradientColumns(query, need_query), GradientColumns(key, need_key)
    of_value = GradientColumns(value, need_value)
    as_value = of_key if shared else of_value
    if as_value.needed:
        _multiply(attention.mT, upstream, _heads(as_value.columns, heads))
    if need_query or need_key:
        grad_logits = _through_softmax(attention, _gram(upstream, values), _factor(query, scale))
        _to_query_and_key(grad_logits, query, key, of_query, of_key, onto_key=shared)
    return of_query.finish(), of_key.finish(), of_value.finish()


def channel_attention_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int
) -> tuple[Tensor, Tensor]:
    """-> distance (B,), attention (B, heads, Cq / heads, Ck / heads)."""
    attention = _attention(query, key, scale, heads)
    values, targets = _matrices(key if value is None else value, heads), _matrices(target, heads)
    sums = attention.new_zeros(attention.shape[:2], dtype=torch.float64)
    for tile in _tiles(values):
        sums[tile[:2]] += _residual(attention, values, targets, tile)[1]
    return sums.sum(dim=1).to(attention.dtype), attention


def channel_attention_distance_backward(
    grad: Tensor,
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    target: Tensor,
    scale: float | None,
    heads: int,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and target, by one sweep over value and target that forms the residual again."""
    shared, value = value is None, key if value is None else value
    values, targets = _matrices(value, heads), _matrices(target, heads)
    of_query, of_key = GradientColumns(query, need_query), GradientColumns(key, need_key)
    of_value, of_target = GradientColumns(value, need_value), GradientColumns(target, need_target)
    as_value = of_key if shared else of_value
    slope = (2 * grad)[:, None, None, None].expand(*attention.shape[:2], 1, 1)  # of the square
    to_value = slope * attention.mT
    grad_attention = torch.zeros_like(attention)
    for tile in _tiles(values):
        residual, _ = _residual(attention, values, targets, tile)
        if need_query or need_key:
            grad_attention[tile[:2]].baddbmm_(residual, _wide(values[tile]).mT)
        if as_value.needed:
            _multiply_tile(to_value[tile[:2]], residual, _heads(as_value.columns, heads)[tile])
        if need_target:
            _heads(of_target.columns, heads)[tile] = residual * -slope[tile[:2]]
    if need_query or need_key:
        grad_logits = _through_softmax(attention, slope * grad_attention, _factor(query, scale))
        _to_query_and_key(grad_logits, query, key, of_query, of_key, onto_key=shared)
    return of_query.finish(), of_key.finish(), of_value.finish(), of_target.finish()


# --- the C x C matrices ----------------------------------------------------------------------------------------------------------


def _factor(query: Tensor, scale: float | None) -> float:
    return query.shape[2:].numel() ** -0.5 if scale is None else scale


def _attention(query: Tensor, key: Tensor, scale: float | None, heads: int) -> Tensor:
    logits = _gram(_matrices(query, heads), _matrices(key, heads))
    logits *= _factor(query, scale)
    return logits.softmax(dim=-1)


def _through_softmax(attention: Tensor, grad_attention: Tensor, scale: float) -> Tensor:
    """The gradient of the unscaled logits query . key."""
    # Not torch's own formula, whose bits depend on the number of threads.
    weighted = attention * grad_attention
    grad_logits: Tensor = weighted.sub_(attention * weighted.sum(dim=-1, keepdim=True)).mul_(scale)
    return grad_logits


def _to_query_and_key(
    grad_logits: Tensor,
    query: Tensor,
    key: Tensor,
    of_query: GradientColumns,
    of_key: GradientColumns,
    *,
    onto_key: bool,
) -> None:
    """Through the Gram matrix; `onto_key` adds to what the gradient of the key already holds."""
    heads = grad_logits.shape[1]
    if of_query.needed:
        _multiply(grad_logits, _matrices(key, heads), _heads(of_query.columns, heads))
    if of_key.needed:
        _multiply(grad_logits.mT, _matrices(query, heads), _heads(of_key.columns, heads), onto=onto_key)


# --- maps and tiles --------------------------------------------------------------------------------------------------------------


def _matrices(maps: Tensor, heads: int) -> Tensor:
    """(B, C, *S) as (B, heads, C / heads, N): a view, or a copy where positions overlap or are not a fixed stride apart."""
    if 0 in maps.stride():
        maps = maps.contiguous()
    return _heads(maps.flatten(2), heads)


def _heads(columns: Tensor, heads: int) -> Tensor:
    """(B, C, N) as (B, heads, C / heads, N)."""
    matrices: Tensor = columns.unflatten(1, (heads, columns.shape[1] // heads))
    return matrices


def _wide(t: Tensor) -> Tensor:
    """In the dtype that products accumulate in."""
    return t if t.dtype == torch.float64 else t.float()


def _tiles(maps: Tensor, *, whole: bool = False) -> Iterator[Index]:
    """Indices that cut (B, heads, C, N) into stacks of matrices of some columns (`whole`: of all), without a copy in any layout."""
    batch, heads, channels, positions = maps.shape
    stacks: list[Index] = [(slice(None), 0)] if heads == 1 else [(b, slice(None)) for b in range(batch)]
    rows = max(1, channels * (batch if heads == 1 else heads))
    width = positions if whole else max(NARROWEST, TILE // rows // NARROWEST * NARROWEST)
    for stack in stacks:
        for begin in range(0, positions, width):
            yield *stack, slice(None), slice(begin, begin + width)


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """(B, heads, Cx, N) and (B, heads, Cy, N) -> (B, heads, Cx, Cy), in the dtype that products accumulate in."""
    gram = _wide(x.new_empty(0)).new_zeros((*x.shape[:3], y.shape[2]))
    for tile in _tiles(x, whole=x.dtype == gram.dtype):
        gram[tile[:2]].baddbmm_(_wide(x[tile]), _wide(y[tile]).mT)
    return gram


def _multiply(matrix: Tensor, maps: Tensor, out: Tensor, *, onto: bool = False) -> None:
    """out = matrix @ maps, or added to what is there."""
    for tile in _tiles(maps, whole=maps.dtype == matrix.dtype):
        _multiply_tile(matrix[tile[:2]], _wide(maps[tile]), out[tile], onto=onto)


def _multiply_tile(matrix: Tensor, maps: Tensor, out: Tensor, *, onto: bool = False) -> None:
    if out.dtype == matrix.dtype:
        out.baddbmm_(matrix, maps, beta=1 if onto else 0)
    else:
        product = matrix @ maps
        out.copy_(product.add_(out) if onto else product)


def _residual(attention: Tensor, values: Tensor, targets: Tensor, tile: Index) -> tuple[Tensor, Tensor]:
    """attention @ value - target for a tile, in the layout of the target, and its sums of squares."""
    matrix, maps, target = attention[tile[:2]], _wide(values[tile]), _wide(targets[tile])
    by_rows = target.stride(-1) == 1
    product = torch.bmm(matrix, maps) if by_rows else torch.bmm(maps.mT, matrix.mT).mT
    return product, difference_(product, target, 2)
