# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The distance between channel attention and a target as Triton kernels; beside those of the attention itself.

It needs no output O = A V. With R = O - Y, R V^T = A V V^T - Y V^T and ||R||^2 = tr(A V V^T A^T) - 2 tr(A V Y^T) + ||Y||^2: Grams of one
sweep over the maps. These are differences of large numbers where the output is close to the target. Samples where it is are marked on
the device, and kernels that form R, tile by tile, are launched behind the others: they return at once for all samples but those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import GradientColumns
from ..tiles import features
from .triton import attention_of, factor_of, gradient_of_logits, shape_of
from .triton_products import launch_grams, launch_mix, matrix_features, same, store_tile, tile_of

CLOSE = 2**-5  # below this part of the target's square, the distance by Grams has lost five bits or more
DIRECT = {"BLOCK": 64, "POSITIONS": 32, "num_warps": 8}  # of the kernels that form the residual
DIRECT_GRAM = {"BLOCK": 32, "POSITIONS": 32, "num_warps": 4}  # with larger blocks registers spill

# --- the residual, for samples close to their target -----------------------------------------------------------------------------


@triton.jit
def _residual(attention, value, target, head, heads, n, i, R, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """attention @ value - target in float32, (n, i)."""
    sums = tl.zeros((n.shape[0], i.shape[0]), tl.float32)
    for first in range(0, attention.positions, DEPTH):
        k = first + tl.arange(0, DEPTH)
        v = tiles.widen(tile_of(value, head, heads, n, k, attention.positions))
        sums += tiles.dot(v, tile_of(attention, head, 1, k, i, R), PRECISION)
    sums -= tiles.widen(tile_of(target, head, heads, n, i, R))
    return tl.where((n < target.positions)[:, None] & (i < R)[None, :], sums, 0.0)


@triton.jit(do_not_specialize=["heads", "chunks", "R", "C"])
def _residual_sums(
    attention,
    value,
    target,
    direct,  # (B,) int32: which samples
    squares,  # (heads, chunks, R) float32, or None
    gram,  # (heads, chunks, R, C) float32: residual value^T, or None
    heads,
    chunks,
    R,
    C,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a block of channels of the target and, where gram is given, one of the value, over a chunk of the positions."""
    program = tl.program_id(0).to(tl.int64)
    rows = tl.cdiv(R, BLOCK)
    columns = 1
    if gram is not None:
        columns = tl.cdiv(C, BLOCK)
    part = program // (rows * columns)  # counts the chunks of all heads
    head = part // chunks
    if tl.load(direct + head // heads) == 0:
        return
    i = program // columns % rows * BLOCK + tl.arange(0, BLOCK)
    j = program % columns * BLOCK + tl.arange(0, BLOCK)
    steps = tl.cdiv(tl.cdiv(value.positions, POSITIONS), chunks)
    square = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        n = (part % chunks * steps + step) * POSITIONS + tl.arange(0, POSITIONS)
        residual = _residual(attention, value, target, head, heads, n, i, R, POSITIONS, PRECISION)
        if gram is not None:
            sums += tiles.dot(tl.trans(residual), tiles.widen(tile_of(value, head, heads, n, j, C)), PRECISION)
        else:
            square += tl.sum(residual * residual, 0)
    if gram is not None:
        out = gram + (part * R + i)[:, None] * C + j[None, :]
        tiles.store(out, sums, (i < R)[:, None] & (j < C)[None, :])
    else:
        tiles.store(squares + part * R + i, square, i < R)


@triton.jit(do_not_specialize=["heads", "R", "C"])
def _residual_mix(
    out,
    matrix,  # of a first term, or None
    first_map,
    attention,
    value,
    target,
    direct,  # (B,) int32: which samples
    factor,  # (B,) float32
    heads,
    R,
    C,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = factor * (attention^T @ residual + matrix @ first_map); one program: a block of channels of the value at some positions."""
    program = tl.program_id(0).to(tl.int64)
    blocks, strips = tl.cdiv(C, BLOCK), tl.cdiv(out.positions, POSITIONS)
    head = program // (blocks * strips)
    if tl.load(direct + head // heads) == 0:
        return
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = program // blocks % strips * POSITIONS + tl.arange(0, POSITIONS)
    sums = tl.zeros((POSITIONS, BLOCK), tl.float32)
    if matrix is not None:
        for first in range(0, matrix.positions, POSITIONS):
            k = first + tl.arange(0, POSITIONS)
            x = tiles.widen(tile_of(first_map, head, heads, n, k, matrix.positions))
            sums += tiles.dot(x, tile_of(matrix, head, 1, k, j, C), PRECISION)
    for first in range(0, R, POSITIONS):
        i = first + tl.arange(0, POSITIONS)
        residual = _residual(attention, value, target, head, heads, n, i, R, POSITIONS, PRECISION)
        weights = tl.trans(tile_of(attention, head, 1, j, i, R))
        sums += tiles.dot(residual, weights, PRECISION)
    sums *= tl.load(factor + head // heads)
    store_tile(out, sums, head, heads, n, j, C)


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _launch_residual_sums(attention: Tensor, value: Tensor, target: Tensor, direct: Tensor, gram: bool) -> Tensor:
    """||residual||^2 (B,) float64 or, with `gram`, residual value^T (B, heads, R, C); only for the samples marked in `direct`."""
    batch, heads, r, c = attention.shape
    v, t = features(value), features(target)
    options = DIRECT_GRAM if gram else DIRECT
    rows, columns = triton.cdiv(r, options["BLOCK"]), triton.cdiv(c, options["BLOCK"]) if gram else 1
    chunks = tiles.chunks(v.positions, batch * heads * rows * columns, value.device)
    shape = (r, c) if gram else (r,)
    sums = attention.new_empty((batch * heads, chunks, *shape))
    _residual_sums[(batch * heads * chunks * rows * columns,)](
        matrix_features(attention, torch.float32),
        v,
        t,
        direct,
        None if gram else sums,
        sums if gram else None,
        heads,
        chunks,
        r,
        c,
        PRECISION=tiles.precision(),
        **options,
        **tiles.OPTIONS,
    )
    return sums.sum(1).view_as(attention) if gram else sums.view(batch, -1).sum(1, dtype=torch.float64)


def _launch_residual_mix(
    out: Tensor,
    term: tuple[Tensor, Tensor] | None,
    attention: Tensor,
    value: Tensor,
    target: Tensor,
    direct: Tensor,
    factor: Tensor,
) -> None:
    batch, heads, r, c = attention.shape
    to = features(out)
    _residual_mix[(batch * heads * triton.cdiv(c, DIRECT["BLOCK"]) * triton.cdiv(to.positions, DIRECT["POSITIONS"]),)](
        to,
        None if term is None else matrix_features(term[0], torch.float32),
        None if term is None else features(term[1]),
        matrix_features(attention, torch.float32),
        features(value),
        features(target),
        direct,
        factor,
        heads,
        r,
        c,
        PRECISION=tiles.precision(),
        **DIRECT,
        **tiles.OPTIONS,
    )


# --- operators --------------------------------------------------------------------------------------------------------------------


def channel_attention_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> distance (B,), attention and residual value^T (B, heads, Cq / heads, Ck / heads), and which samples are close (B,) int32.

    Of those the second matrix is not exact.
    """
    shape = shape_of(query, key, heads)
    if query.shape[0] == 0:
        nothing = query.new_empty(shape, dtype=torch.float32)
        return query.new_empty(0, dtype=torch.float32), nothing, nothing.clone(), query.new_empty(0, dtype=torch.int32)
    grams = launch_grams(query, key, heads, value, target)
    attention = attention_of(grams.xy, shape, factor_of(query, scale))
    values = grams.values.sum(1)
    cross = grams.cross.sum(1).view(shape)
    of_attention = torch.empty_like(attention)
    launch_mix(
        of_attention.flatten(0, 1), [(attention.view(-1, 1, *shape[2:]), values)], cross.flatten(0, 1), exact=True
    )
    square = grams.squares.view(shape[0], -1).sum(1, dtype=torch.float64)
    distance = square + (attention.double() * (of_attention.double() - cross)).flatten(1).sum(1)
    direct = ~((distance > CLOSE * square) & (distance < float("inf")))  # also where it is not a number
    close = direct.int()
    residual = _launch_residual_sums(attention, key if value is None else value, target, close, gram=False)
    return torch.where(direct, residual, distance).float(), attention, of_attention, close


def channel_attention_distance_backward(
    grad: Tensor,
    attention: Tensor,
    of_attention: Tensor,
    close: Tensor,
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
    """The gradients of query, key, value and target: by the residual only those of the target and of samples close to it."""
    v = key if value is None else value
    of_query, of_key, of_value, of_target = (
        GradientColumns(t, need)
        for t, need in ((query, need_query), (key, need_key), (v, need_value), (target, need_target))
    )
    if query.shape[0] > 0:
        slope = 2 * grad.float()  # of the square
        of_logits = attention
        if need_query or need_key:
            exactly = _launch_residual_sums(attention, v, target, close, gram=True)
            of_attention = torch.where(close[:, None, None, None] != 0, exactly, of_attention)
            of_logits = gradient_of_logits(of_attention.flatten(0, 1).unsqueeze(1), attention, factor_of(query, scale))
        if need_query:
            launch_mix(of_query.columns, [(of_logits, key)], factor=slope)
        by_logits = of_logits.mT, query
        if need_key and value is None:
            _of_value(of_key.columns, by_logits, attention, v, target, close, slope)
        elif need_key:
            launch_mix(of_key.columns, [by_logits], factor=slope)
        if need_value:
            _of_value(of_value.columns, None, attention, v, target, close, slope)
        if need_target:
            launch_mix(of_target.columns, [(attention, v)], minus=target, factor=-slope)
    return of_query.finish(), of_key.finish(), of_value.finish(), of_target.finish()


def _of_value(
    out: Tensor,
    term: tuple[Tensor, Tensor] | None,
    attention: Tensor,
    value: Tensor,
    target: Tensor,
    close: Tensor,
    slope: Tensor,
) -> None:
    """out = slope * (attention^T residual + the term), its residual formed for close samples only."""
    square = attention.new_empty((*attention.shape[:2], attention.shape[3], attention.shape[3]))
    maps = attention.flatten(0, 1)
    launch_mix(square.flatten(0, 1), [(maps.mT.unsqueeze(1), maps)], exact=True)
    terms = [(square, value)]
    if term is not None and same(term[1], target):
        terms.append((term[0] - attention.mT, target))
    else:
        terms += [(-attention.mT, target), *([] if term is None else [term])]
    launch_mix(out, terms, factor=slope, direct=close)
    _launch_residual_mix(out, term, attention, value, target, close, slope)
