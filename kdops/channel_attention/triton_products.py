# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The products of channel attention as Triton kernels, for the attention itself and for its distance.

Two kernels read feature maps: `_grams` multiplies maps with maps, summed over positions, and `_mix` multiplies C x C matrices with maps.
Positions are cut into chunks, each summed on its own and the chunks then in order: the same input gives the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import Features, features

# --- maps times maps -------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(features, head, heads, n, c, C):
    """Positions n and channels c (of C) of one head, (n, c); 0 where there is none. Heads of all samples are numbered in one row."""
    pointers = tiles._pointers(features, head // heads, n, head % heads * C + c)
    return tl.load(pointers, mask=(n < features.positions)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _gram_block(
    x, y, out, squares, block, chunk, head, heads, chunks, CX, CY, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One block of out[head, chunk] = x y^T over a chunk of the positions, and of the squares of x (if not None)."""
    columns = tl.cdiv(CY, BLOCK)
    i = block // columns * BLOCK + tl.arange(0, BLOCK)
    j = block % columns * BLOCK + tl.arange(0, BLOCK)
    steps = tl.cdiv(tl.cdiv(x.positions, POSITIONS), chunks)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (chunk * steps + step) * POSITIONS + tl.arange(0, POSITIONS)
        a = tile_of(x, head, heads, n, i, CX)
        b = tile_of(y, head, heads, n, j, CY)
        sums += tiles.dot(tl.trans(a), b, PRECISION)
        if squares is not None:
            wide = tiles.widen(a)
            square += tl.sum(wide * wide, 0)
    row = (head * chunks + chunk) * CX + i
    tiles.store(out + row[:, None] * CY + j[None, :], sums, (i < CX)[:, None] & (j < CY)[None, :])
    if squares is not None:  # noqa: SIM102  (known when the kernel is compiled)
        if block % columns == 0:
            tiles.store(squares + row, square, i < CX)


@triton.jit(do_not_specialize=["heads", "chunks"])
def _grams(
    x,
    y,
    value,  # None: y
    target,  # None: x
    xy,  # (heads, chunks, CX, CY) float32
    values,  # (heads, chunks, CY, CY), or None where only xy is wanted
    cross,  # (heads, chunks, CX, CY), or None where the target is x and the value is y, and so it is xy
    squares,  # (heads, chunks, CX) of the target, or None
    heads,  # of a sample
    chunks,
    CX,
    CY,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a block of x y^T, of value value^T or of target value^T, over a chunk of the positions.

    Blocks vary fastest: programs that run together read the same positions, from memory once.
    """
    program = tl.program_id(0).to(tl.int64)
    rows, columns = tl.cdiv(CX, BLOCK), tl.cdiv(CY, BLOCK)
    blocks = rows * columns
    of_xy = blocks
    if values is not None:
        blocks += columns * columns
    of_xy_and_values = blocks
    if cross is not None:
        blocks += rows * columns
    block = program % blocks
    chunk = program // blocks % chunks
    head = program // (blocks * chunks)
    if block < of_xy:
        _gram_block(
            x,
            y,
            xy,
            squares if cross is None else None,
            block,
            chunk,
            head,
            heads,
            chunks,
            CX,
            CY,
            BLOCK,
            POSITIONS,
            STAGES,
            PRECISION,
        )
    if values is not None:
        v = y if value is None else value
        if (block >= of_xy) & (block < of_xy_and_values):
            _gram_block(
                v,
                v,
                values,
                None,
                block - of_xy,
                chunk,
                head,
                heads,
                chunks,
                CY,
                CY,
                BLOCK,
                POSITIONS,
                STAGES,
                PRECISION,
            )
        if cross is not None:
            t = x if target is None else target
            if block >= of_xy_and_values:
                _gram_block(
                    t,
                    v,
                    cross,
                    squares,
                    block - of_xy_and_values,
                    chunk,
                    head,
                    heads,
                    chunks,
                    CX,
                    CY,
                    BLOCK,
                    POSITIONS,
                    STAGES,
                    PRECISION,
                )


# --- matrices times maps ---------------------------------------------------------------------------------------------------------


@triton.jit
def _add_product(
    sums, matrix, x, head, heads, n, i, R, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """sums (n, i) + rows i (of R) of the matrix times positions n of x. The matrix is Features too: rows are its channels."""
    for first in tl.range(0, matrix.positions, DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, DEPTH)
        a = tile_of(x, head, heads, n, k, matrix.positions)
        b = tile_of(matrix, head, 1, k, i, R)
        sums += tiles.dot(a, b, PRECISION)
    return sums


@triton.jit(do_not_specialize=["heads"])
def _mix(
    out,
    first_matrix,
    first_map,
    second_matrix,  # None where there are fewer terms
    second_map,
    third_matrix,
    third_map,
    minus,  # a map, or None
    factor,  # (B,) float32, or None
    direct,  # (B,) int32: the samples to leave out, or None
    heads,
    R,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = factor * (the sum of matrix times map - minus); one program: a block of channels of one head at some positions."""
    program = tl.program_id(0).to(
        tl.int64
    )  # blocks of channels vary fastest: programs that run together read the same positions
    blocks, strips = tl.cdiv(R, BLOCK), tl.cdiv(out.positions, POSITIONS)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = program // blocks % strips * POSITIONS + tl.arange(0, POSITIONS)
    head = program // (blocks * strips)
    if direct is not None:  # noqa: SIM102  (known when the kernel is compiled)
        if tl.load(direct + head // heads) != 0:
            return
    sums = tl.zeros((POSITIONS, BLOCK), tl.float32)
    sums = _add_product(sums, first_matrix, first_map, head, heads, n, i, R, DEPTH, STAGES, PRECISION)
    if second_matrix is not None:
        sums = _add_product(sums, second_matrix, second_map, head, heads, n, i, R, DEPTH, STAGES, PRECISION)
    if third_matrix is not None:
        sums = _add_product(sums, third_matrix, third_map, head, heads, n, i, R, DEPTH, STAGES, PRECISION)
    if minus is not None:
        sums -= tiles.widen(tile_of(minus, head, heads, n, i, R))
    if factor is not None:
        sums *= tl.load(factor + head // heads)
    store_tile(out, sums, head, heads, n, i, R)


@triton.jit
def store_tile(features, values, head, heads, n, c, C):
    pointers = tiles._pointers(features, head // heads, n, head % heads * C + c)
    tiles.store(pointers, values, (n < features.positions)[:, None] & (c < C)[None, :])


# --- launches --------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How much of a product one program does: `block` channels of the result (in Grams of both maps), in steps of `depth`."""

    block: int
    positions: int  # of a result that has positions
    depth: int
    warps: int
    stages: int


def tile_for(channels: int, dtype: torch.dtype) -> Tile:
    """Small enough that no register spills; of two sizes that one which leaves less of its last block empty."""
    largest = min(64 if dtype == torch.float32 else 128, max(16, triton.next_power_of_2(channels)))
    block = min((largest, max(16, largest // 2)), key=lambda size: (triton.cdiv(channels, size) * size, -size))
    if dtype == torch.float32:
        return Tile(block, 64, 32, 8 if block == 64 else 4, 2)
    return Tile(block, 128 if block == 128 else 64, 64, 8 if block == 128 else 4, 3)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory. Not by `is`: autograd gives out new objects."""
    storages = [t.untyped_storage()._cdata for t in (a, b)]  # data_ptr is 0 for all tensors that are only planned
    same_memory = storages[0] == storages[1] and a.storage_offset() == b.storage_offset()
    return same_memory and a.shape == b.shape and a.stride() == b.stride()


class Grams(NamedTuple):
    """Sums over positions, a chunk at a time, float32."""

    xy: Tensor  # (B * heads, chunks, Cx / heads, Cy / heads)
    values: (
        Tensor  # value value^T, (B * heads, chunks, Cy / heads, Cy / heads); this and the others (0,) without a target
    )
    cross: Tensor  # target value^T, as xy; xy itself where the target is x and the value is y
    squares: Tensor  # of the target's channels, (B * heads, chunks, Cx / heads)


def launch_grams(x: Tensor, y: Tensor, heads: int, value: Tensor | None = None, target: Tensor | None = None) -> Grams:
    """x y^T; where a target is given also value value^T, target value^T and the target's squares (value None: y)."""
    total, cx, cy = x.shape[0] * heads, x.shape[1] // heads, y.shape[1] // heads
    tile = tile_for(max(cx, cy), x.dtype)
    if tiles.architecture() == "cuda:100" and tile.block == 64:
        # There ptxas spills registers of four warps, to fit more programs.
        tile = tile._replace(warps=8)
    alike = target is not None and value is None and same(target, x)
    rows, columns = triton.cdiv(cx, tile.block), triton.cdiv(cy, tile.block)
    blocks = rows * columns + (0 if target is None else columns * columns + (0 if alike else rows * columns))
    maps = [features(t) for t in (x, y, value, target) if t is not None]
    chunks = tiles.chunks(max(m.positions for m in maps), total * blocks, x.device)

    def empty(wanted: bool, *shape: int) -> Tensor:
        return x.new_empty((total, chunks, *shape) if wanted else (0,), dtype=torch.float32)

    asked = target is not None
    xy = empty(True, cx, cy)
    cross = xy if alike else empty(asked, cx, cy)
    grams = Grams(xy, empty(asked, cy, cy), cross, empty(asked, cx))
    _grams[(total * chunks * blocks,)](
        features(x),
        features(y),
        None if value is None else features(value),
        None if target is None or alike else features(target),
        grams.xy,
        grams.values if asked else None,
        grams.cross if asked and not alike else None,
        grams.squares if asked else None,
        heads,
        chunks,
        cx,
        cy,
        tile.block,
        tile.depth,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.OPTIONS,
    )
    return grams


def matrix_features(matrix: Tensor, dtype: torch.dtype) -> Features:
    """(B, heads, R, K) as a map: rows are its channels and columns its positions."""
    return features(matrix.flatten(0, 1).to(dtype))


def launch_mix(
    out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],  # matrix (B, heads, R, K), map (B, heads * K, N)
    minus: Tensor | None = None,
    factor: Tensor | None = None,
    direct: Tensor | None = None,
    exact: bool = False,
) -> None:
    """out (B, heads * R, N) = factor * (sum of matrix times map - minus)."""
    batch, heads, r, _ = terms[0][0].shape
    dtype = terms[0][1].dtype
    tile = tile_for(r, dtype)
    pairs = [t for matrix, x in terms for t in (matrix_features(matrix, dtype), features(x))]
    absent = [None] * (6 - len(pairs))
    to = features(out)
    grid = (batch * heads * triton.cdiv(r, tile.block) * triton.cdiv(to.positions, tile.positions),)
    _mix[grid](
        to,
        *pairs,
        *absent,
        None if minus is None else features(minus),
        factor,
        direct,
        heads,
        r,
        tile.block,
        tile.positions,
        tile.depth,
        tile.stages,
        "ieee" if exact else tiles.precision(),
        num_warps=8 if exact else tile.warps,
        **tiles.OPTIONS,
    )
