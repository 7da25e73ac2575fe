# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""Channel attention as Triton kernels: a Gram over all positions, its softmax, and the application, by triton_products.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import GradientColumns
from .triton_products import launch_grams, launch_mix

# --- C x C matrices --------------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_chunks(partial, r, chunks, R, C, COLUMNS: tl.constexpr):
    """Rows r (of all heads, R each) of partial (heads, chunks, R, C), summed over the chunks."""
    j = tl.arange(0, COLUMNS)[None, :]
    row = (r // R * chunks * R + r % R)[:, None] * C + j
    sums = tl.zeros((r.shape[0], COLUMNS), tl.float32)
    for _ in range(chunks):
        sums += tiles.load(partial + row, j < C)
        row += R * C
    return sums


@triton.jit(do_not_specialize=["total", "scale", "chunks", "R", "C"])
def _softmax(
    partial, attention, total, scale, chunks, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr
):
    """attention (heads, R, C), of `total` rows = the softmax of scale * partial (heads, chunks, R, C) summed over chunks."""
    tiles.start(EARLY)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)[None, :]
    logits = _sum_chunks(partial, tl.minimum(r, total - 1), chunks, R, C, COLUMNS) * scale
    logits = tl.where(j < C, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    tiles.store(attention + r[:, None] * C + j, weights, (r < total)[:, None] & (j < C))


@triton.jit(do_not_specialize=["total", "scale", "chunks", "R", "C"])
def _softmax_backward(
    partial,
    attention,
    slopes,
    total,
    scale,
    chunks,
    R,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The gradient of the logits before they were scaled, from that of the attention, `partial` summed over chunks."""
    tiles.start(EARLY)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)[None, :]
    inside = (r < total)[:, None] & (j < C)
    weights = tiles.load(attention + r[:, None] * C + j, inside)
    weighted = weights * _sum_chunks(partial, tl.minimum(r, total - 1), chunks, R, C, COLUMNS)
    tiles.store(slopes + r[:, None] * C + j, (weighted - weights * tl.sum(weighted, 1)[:, None]) * scale, inside)


def _rows(columns: int) -> dict[str, int]:
    """Of a program that needs whole rows of a C x C matrix."""
    width = tiles.next_power_of_2(columns)
    return {"ROWS": max(1, 1024 // width), "COLUMNS": width, "num_warps": 4}


def attention_of(partial: Tensor, shape: tuple[int, ...], scale: float) -> Tensor:
    (total, chunks, _), (_, _, r, c) = partial.shape, shape
    attention = partial.new_empty(shape)
    launch = _rows(c)
    grid = (tiles.cdiv(total * r, launch["ROWS"]),)
    _softmax[grid](partial, attention, total * r, scale, chunks, r, c, **launch, **tiles.early(), **tiles.OPTIONS)
    return attention


def gradient_of_logits(partial: Tensor, attention: Tensor, scale: float) -> Tensor:
    (total, chunks, _), (_, _, r, c) = partial.shape, attention.shape
    slopes = torch.empty_like(attention)
    launch = _rows(c)
    grid = (tiles.cdiv(total * r, launch["ROWS"]),)
    _softmax_backward[grid](
        partial, attention, slopes, total * r, scale, chunks, r, c, **launch, **tiles.early(), **tiles.OPTIONS
    )
    return slopes


# --- operators -------------------------------------------------------------------------------------------------------------------


def factor_of(query: Tensor, scale: float | None) -> float:
    return query.shape[2:].numel() ** -0.5 if scale is None else scale


def shape_of(query: Tensor, key: Tensor, heads: int) -> tuple[int, ...]:
    return query.shape[0], heads, query.shape[1] // heads, key.shape[1] // heads


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, heads: int
) -> tuple[Tensor, Tensor]:
    """-> out (B, Cq, *S), attention (B, heads, Cq / heads, Ck / heads) float32."""
    value = key if value is None else value
    out = query.new_empty(query.shape[:2] + value.shape[2:])
    shape = shape_of(query, key, heads)
    if query.shape[0] == 0:
        return out, out.new_empty(shape, dtype=torch.float32)
    attention = attention_of(launch_grams(query, key, heads).sums, shape, factor_of(query, scale))
    launch_mix(out, [(attention, value)])
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
    v = key if value is None else value
    of_query, of_key, of_value = (
        GradientColumns(t, need) for t, need in ((query, need_query), (key, need_key), (v, need_value))
    )
    if query.shape[0] > 0:
        of_logits = attention
        if need_query or need_key:
            of_logits = gradient_of_logits(launch_grams(grad, v, heads).sums, attention, factor_of(query, scale))
        if need_query:
            launch_mix(of_query.columns, [(of_logits, key)])
        as_value = (attention.mT, grad)
        if need_key:
            launch_mix(of_key.columns, [(of_logits.mT, query), *([as_value] if value is None else [])])
        if need_value:
            launch_mix(of_value.columns, [as_value])
    return of_query.finish(), of_key.finish(), of_value.finish()
