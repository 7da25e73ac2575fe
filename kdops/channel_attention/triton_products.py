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
from ..tiles import features

ZEROS = tl.constexpr(128)  # that a program writes at once

# --- maps times maps -------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(features, head, heads, n, c, C):
    """Positions n and channels c (of C) of one head, (n, c); 0 where there is none. Heads of all samples are numbered in one row."""
    pointers = tiles._pointers(features, head // heads, n, head % heads * C + c)
    return tl.load(pointers, mask=(n < features.positions)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit(do_not_specialize=["heads", "chunks", "zeros_count"])
def _grams(
    x,
    y,
    value,  # None: y
    target,  # None: x
    sums,  # (heads, chunks, width) float32; the width holds the Grams behind each other, in the order of `Grams`
    width,
    heads,  # of a sample
    chunks,
    zeros,  # int32, to be set to 0 for the kernels behind, or None
    zeros_count,
    CX,
    CY,
    DISTANCE: tl.constexpr,  # whether more than x y^T is wanted
    WHOLE: tl.constexpr,  # whether a block holds all channels
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: a block of x y^T and, of distances, of value value^T and target value^T, over a chunk of the positions.

    A tile is loaded once for all of them. Blocks vary fastest: programs that run together read the same positions, from memory once.
    """
    tiles.start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(tl.maximum(CX, CY), BLOCK)
    i = program // columns % columns * BLOCK + tl.arange(0, BLOCK)
    j = program % columns * BLOCK + tl.arange(0, BLOCK)
    part = program // (columns * columns)
    head, chunk = part // chunks, part % chunks
    if zeros is not None:
        for first in range(program * ZEROS, zeros_count, tl.num_programs(0) * ZEROS):
            at = first + tl.arange(0, ZEROS)
            tiles.store(zeros + at, tl.zeros((ZEROS,), tl.int32), at < zeros_count)
    steps = tl.cdiv(tl.cdiv(x.positions, POSITIONS), chunks)
    if DISTANCE:
        v = y if value is None else value
        t = x if target is None else target
        steps = tl.maximum(steps, tl.cdiv(tl.cdiv(v.positions, POSITIONS), chunks))
    xy = tl.zeros((BLOCK, BLOCK), tl.float32)
    values = tl.zeros((BLOCK, BLOCK), tl.float32)
    cross = tl.zeros((BLOCK, BLOCK), tl.float32)
    squares = tl.zeros((POSITIONS, BLOCK), tl.float32)  # summed over positions at the end: threads would meet for it
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (chunk * steps + step) * POSITIONS + tl.arange(0, POSITIONS)
        a = tile_of(x, head, heads, n, i, CX)
        b = tile_of(y, head, heads, n, j, CY)
        xy += tiles.dot(tl.trans(a), b, PRECISION)
        if DISTANCE:
            if target is not None:
                a = tile_of(t, head, heads, n, i, CX)
            if value is not None:
                b = tile_of(v, head, heads, n, j, CY)
            c = b if WHOLE else tile_of(v, head, heads, n, i, CY)
            values += tiles.dot(tl.trans(c), b, PRECISION)
            if value is not None or target is not None:
                cross += tiles.dot(tl.trans(a), b, PRECISION)
            wide = tiles.widen(a)
            squares += wide * wide
    at = sums + part * width
    of_xy = (i < CX)[:, None] & (j < CY)[None, :]
    tiles.store(at + i[:, None] * CY + j[None, :], xy, of_xy)
    if DISTANCE:
        at += CX * CY
        tiles.store(at + i[:, None] * CY + j[None, :], values, (i < CY)[:, None] & (j < CY)[None, :])
        at += CY * CY
        tiles.store(at + i, tl.sum(squares, 0), i < CX)  # by every block of columns, the same
        if value is not None or target is not None:
            tiles.store(at + CX + i[:, None] * CY + j[None, :], cross, of_xy)


# --- matrices times maps ---------------------------------------------------------------------------------------------------------


@triton.jit
def _matrix_tile(matrix, head, k, i, R, DTYPE: tl.constexpr):
    """Columns k and rows i (of R) of one head's matrix, in the dtype of the maps. It is Features too: rows are its channels."""
    return tiles.narrow(tiles.widen(tile_of(matrix, head, 1, k, i, R)), DTYPE)


@triton.jit
def _add_product(
    sums, matrix, held, x, head, heads, n, i, R, WHOLE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """sums (n, i) + rows i (of R) of the matrix times positions n of x; `held` is the tile of the matrix that holds them, if WHOLE."""
    if matrix is not None:
        if WHOLE:
            a = tile_of(x, head, heads, n, tl.arange(0, DEPTH), matrix.positions)
            sums += tiles.dot(a, held, PRECISION)
        else:
            for first in tl.range(0, matrix.positions, DEPTH, num_stages=STAGES):
                k = first + tl.arange(0, DEPTH)
                a = tile_of(x, head, heads, n, k, matrix.positions)
                b = tl.load(tiles._pointers(matrix, head, k, i), mask=(i < R)[None, :], other=0.0)  # padded along k
                sums += tiles.dot(a, b, PRECISION)
    return sums


@triton.jit(do_not_specialize=["factor_stride", "gain", "heads", "chunks"])
def _mix(
    out,
    first_matrix,
    first_map,
    second_matrix,  # None where there are fewer terms
    second_map,
    third_matrix,
    third_map,
    minus,  # a map, or None
    factor,  # (B,), or None
    factor_stride: tl.int64,  # 0 where the factor is expanded
    gain,
    direct,  # (B,) int32: the samples to leave out, or None
    heads,
    chunks,
    R,
    WHOLE: tl.constexpr,  # whether DEPTH holds all columns of the matrices
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = gain * factor * (the sum of matrix times map - minus).

    One program: a block of channels of one head at a chunk of the positions, its matrices held on chip all the while.

    Everything goes from the end to the beginning: `_grams` has mostly just read these maps, and what it read last is still in the L2 cache.
    """
    tiles.start(EARLY)
    # Blocks of channels vary fastest: programs that run together read the same positions.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    blocks = tl.cdiv(R, BLOCK)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    chunk = program // blocks % chunks
    head = program // (blocks * chunks)
    if direct is not None:  # noqa: SIM102  (known when the kernel is compiled)
        if tl.load(direct + head // heads) != 0:
            return
    if factor is not None:
        gain *= tiles.load(factor + head // heads * factor_stride, True)
    one, two, three = None, None, None
    if WHOLE:
        k = tl.arange(0, DEPTH)
        DTYPE: tl.constexpr = first_map.data.dtype.element_ty
        one = _matrix_tile(first_matrix, head, k, i, R, DTYPE)
        if second_matrix is not None:
            two = _matrix_tile(second_matrix, head, k, i, R, DTYPE)
        if third_matrix is not None:
            three = _matrix_tile(third_matrix, head, k, i, R, DTYPE)
    steps = tl.cdiv(tl.cdiv(out.positions, POSITIONS), chunks)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = ((chunk + 1) * steps - 1 - step) * POSITIONS + tl.arange(0, POSITIONS)
        sums = tl.zeros((POSITIONS, BLOCK), tl.float32)
        sums = _add_product(sums, first_matrix, one, first_map, head, heads, n, i, R, WHOLE, DEPTH, STAGES, PRECISION)
        sums = _add_product(sums, second_matrix, two, second_map, head, heads, n, i, R, WHOLE, DEPTH, STAGES, PRECISION)
        sums = _add_product(sums, third_matrix, three, third_map, head, heads, n, i, R, WHOLE, DEPTH, STAGES, PRECISION)
        if minus is not None:
            sums -= tiles.widen(tile_of(minus, head, heads, n, i, R))
        store_tile(out, sums * gain, head, heads, n, i, R)


@triton.jit
def store_tile(features, values, head, heads, n, c, C):
    pointers = tiles._pointers(features, head // heads, n, head % heads * C + c)
    tiles.store(pointers, values, (n < features.positions)[:, None] & (c < C)[None, :])


# --- launches --------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How much of a product one program does: `block` channels of the result (in Grams of both maps), in steps of `depth`."""

    block: int
    positions: int
    depth: int  # channels of a map that is multiplied with a matrix
    warps: int
    stages: int
    resident: int = 2  # programs for each multiprocessor are launched at most: all start at once


def on_amd() -> bool:
    """Whether a program has no more than 64 KiB of shared memory, and fewer registers for sums."""
    return tiles.architecture().startswith("hip")


def gram_tile(channels: int, dtype: torch.dtype, grams: int) -> Tile:
    """Small enough that no register spills; of two sizes that one which leaves less of its last block empty."""
    most = 64 if dtype == torch.float32 or grams > 1 or on_amd() else 128
    if dtype == torch.float32 and grams > 1 and tiles.architecture() in ("cuda:80", "cuda:90"):
        most = 32
    largest = min(most, max(16, tiles.next_power_of_2(channels)))
    block = min((largest, max(16, largest // 2)), key=lambda size: (tiles.cdiv(channels, size) * size, -size))
    if dtype == torch.float32:
        apart = (
            block == 64 and tiles.architecture() == "cuda:90"
        )  # a warpgroup has rows of its own (spatial_attention/table.py)
        return Tile(block, 32, 32, 8 if block == most and not apart else 4, 2)
    # On sm_80 and sm_100, and for four maps, ptxas spills registers of four warps.
    wide = block == 128 or (block == 64 and (grams == 3 or tiles.architecture() in ("cuda:80", "cuda:100")))
    if tiles.architecture() == "cuda:90" and grams == 2 and channels <= block:
        return Tile(block, 128, 64, 4, 3)  # the fastest of 30 on an H200, as that of `mix_tile`
    return Tile(block, 64, 64, 8 if wide else 4, 2 if on_amd() else 4)


def mix_tile(rows: int, columns: int, dtype: torch.dtype, terms: int, minus: bool) -> Tile:
    """As above; of bfloat16 all columns of the matrices are held where they are few."""
    tile = gram_tile(rows, dtype, 1)
    few = tiles.architecture() == "cuda:80"  # registers
    if dtype == torch.float32:
        return tile._replace(positions=32 if few else 64)
    depth = max(16, tiles.next_power_of_2(columns))
    tile = tile._replace(warps=8 if tile.block == 128 or (tile.block == 64 and few) else 4, positions=64, stages=3)
    if tiles.architecture() == "cuda:90" and tile.block <= 64:
        tile = tile._replace(positions=128)
    if depth > 128:
        return tile._replace(positions=128 if tile.block == 128 and not few else tile.positions)
    if tiles.architecture() == "cuda:90" and tile.block == 64 == depth:  # the fastest of 15 on an H200
        if terms == 2:
            tile = tile._replace(warps=8, stages=4, resident=1)
        elif terms == 1 and not minus:
            tile = tile._replace(warps=8)
    return tile._replace(depth=depth)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory. Not by `is`: autograd gives out new objects."""
    storages = [t.untyped_storage()._cdata for t in (a, b)]  # data_ptr is 0 for all tensors that are only planned
    same_memory = storages[0] == storages[1] and a.storage_offset() == b.storage_offset()
    return same_memory and a.shape == b.shape and a.stride() == b.stride()


class Grams(NamedTuple):
    """Where each Gram begins in `sums`: x y^T at 0, and for distances those below."""

    sums: Tensor  # (B * heads, chunks, width) float32, sums over a chunk of the positions each
    values: int  # value value^T, (Cy, Cy)
    squares: int  # of the target's channels, (Cx)
    cross: int | None  # target value^T, (Cx, Cy); None where the target is x and the value is y


def launch_grams(
    x: Tensor,
    y: Tensor,
    heads: int,
    value: Tensor | None = None,
    target: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Grams:
    """x y^T; where a target is given also value value^T, target value^T and the target's squares (value None: y). `zeros` become 0."""
    total, cx, cy = x.shape[0] * heads, x.shape[1] // heads, y.shape[1] // heads
    distance = target is not None
    alike = target is not None and value is None and same(target, x)
    most = max(cx, cy)
    tile = gram_tile(most, x.dtype, 1 if not distance else 2 if alike else 3)
    blocks = tiles.cdiv(most, tile.block) ** 2
    maps = [None if t is None else features(t) for t in (x, y, value, None if alike else target)]
    chunks = tiles.chunks(max(m.positions for m in maps if m is not None), total * blocks, x.device, tile.resident)
    values, squares, end = cx * cy, cx * cy + cy * cy, cx * cy + cy * cy + cx
    width = cx * cy if not distance else end if alike else end + cx * cy
    sums = x.new_empty((total, chunks, width), dtype=torch.float32)
    _grams[(total * chunks * blocks,)](
        *maps,
        sums,
        width,
        heads,
        chunks,
        zeros,
        0 if zeros is None else zeros.numel(),
        cx,
        cy,
        distance,
        blocks == 1,
        tile.block,
        tile.positions,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.early(),
        **tiles.OPTIONS,
    )
    return Grams(sums, values, squares, None if alike else end)


def _padded(matrix: Tensor, dtype: torch.dtype, depth: int) -> Tensor:
    """A copy with zeros behind each row up to a multiple of `depth`: kernels need no mask, with which they load 180 numbers singly."""
    total, rows, columns = matrix.shape
    padded = matrix.new_zeros((total, rows, tiles.cdiv(columns, depth) * depth), dtype=dtype)
    return padded[..., :columns].copy_(matrix)


def launch_mix(
    out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],  # matrix (B, heads, R, K), map (B, heads * K, N)
    minus: Tensor | None = None,
    factor: Tensor | None = None,
    gain: float = 1.0,
    direct: Tensor | None = None,
) -> None:
    """out (B, heads * R, N) = gain * factor * (sum of matrix times map - minus)."""
    batch, heads, r, _ = terms[0][0].shape
    dtype = terms[0][1].dtype
    columns = max(matrix.shape[3] for matrix, _ in terms)
    tile = mix_tile(r, columns, dtype, len(terms), minus is not None)
    whole = columns <= tile.depth
    pairs = [
        features(t)
        for m, x in terms
        for t in (m.flatten(0, 1) if whole else _padded(m.flatten(0, 1), dtype, tile.depth), x)
    ]
    to = features(out)
    strips, blocks = tiles.cdiv(to.positions, tile.positions), batch * heads * tiles.cdiv(r, tile.block)
    chunks = min(strips, max(1, tiles.multiprocessors(out.device) * tile.resident // blocks)) if whole else strips
    _mix[(blocks * chunks,)](
        to,
        *pairs,
        *[None] * (6 - len(pairs)),
        None if minus is None else features(minus),
        factor,
        0 if factor is None else factor.stride(0),
        gain,
        direct,
        heads,
        chunks,
        r,
        whole,
        tile.block,
        tile.positions,
        tile.depth,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.early(),
        **tiles.OPTIONS,
    )
