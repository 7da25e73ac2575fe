# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The residual of channel attention, formed tile by tile: for samples so close to their target that Grams would cancel."""

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import features
from .triton_products import on_amd, store_tile, tile_of

CLOSE = 2**-5  # below this part of the target's square, the distance by Grams has lost five bits or more
SUMS = {"BLOCK": 32, "POSITIONS": 32, "num_warps": 4}  # with larger blocks registers spill

# --- kernels ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def distance_of(parts, sample, count, bound, COUNT: tl.constexpr):
    """A sample's distance by Grams, and whether it is to be formed directly: also where it is not a number."""
    k = tl.arange(0, COUNT)
    at = parts + (sample * count + k) * 2
    distance = tl.sum(tl.load(at, mask=k < count, other=0.0))
    square = tl.sum(tl.load(at + 1, mask=k < count, other=0.0))
    far = (distance > bound * square) & (distance < float("inf"))
    return distance, far == 0


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


@triton.jit
def _settle(
    distances, of_attention, sums, counters, sample, head, tile, tiles_of_head, elements, heads, chunks, i, j, R, C, BLOCK: tl.constexpr
):  # fmt: skip
    """A tile of residual value^T by the last of its chunks, and the distance of a sample by the last of its tiles; both in order."""
    width = R * C + R
    if tiles.arrive(counters + head * tiles_of_head + tile, chunks):
        at = sums + head * chunks * width + i[:, None] * C + j[None, :]
        inside = (i < R)[:, None] & (j < C)[None, :]
        gram = tl.zeros((BLOCK, BLOCK), tl.float32)
        for _ in range(chunks):
            gram += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
            at += width
        tiles.store(of_attention + head * R * C + i[:, None] * C + j[None, :], gram, inside)
        of_samples = counters + tl.num_programs(0) // chunks  # behind those of all tiles
        if tiles.arrive(of_samples + sample, heads * tiles_of_head):
            square = tl.zeros((BLOCK, BLOCK), tl.float64)
            for first in range(0, heads * chunks, BLOCK):
                part = first + tl.arange(0, BLOCK)[:, None]
                of_parts = sums + (sample * heads * chunks + part) * width + R * C
                for first_row in range(0, R, BLOCK):
                    r = first_row + tl.arange(0, BLOCK)[None, :]
                    there = (part < heads * chunks) & (r < R)
                    square += tl.load(of_parts + r, mask=there, other=0.0, cache_modifier=".cg").to(tl.float64)
            tiles.store(distances + sample, (tl.sum(square) / elements).to(tl.float32), True)


@triton.jit(do_not_specialize=["elements", "count", "bound", "heads", "chunks", "R", "C"])
def _residual_sums(
    distances,  # (B,)
    close,  # (B,) int32: whether the direct form was taken
    of_attention,  # (heads, R, C): of close samples, residual value^T
    attention,
    value,
    target,
    parts,  # (B, count, 2) float64: they tell which samples are close
    sums,  # (heads, chunks, R * C + R) float32: residual value^T, and the residual's squares
    counters,  # int32, zeros: for each tile of each head and, behind these, for each sample
    elements,  # what distances are divided by
    count,
    bound,
    heads,
    chunks,
    R,
    C,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: a block of channels of the target and one of the value, over a chunk of the positions; only of close samples."""
    tiles.start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    rows, columns = tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK)
    part = program // (rows * columns)  # counts the chunks of all heads
    head = part // chunks
    sample = head // heads
    distance, direct = distance_of(parts, sample, count, bound, COUNT)
    first_of_sample = program % (rows * columns * chunks * heads) == 0
    tiles.store(close + sample, direct, first_of_sample)
    if direct == 0:
        tiles.store(distances + sample, (distance / elements).to(tl.float32), first_of_sample)
        return
    i = program // columns % rows * BLOCK + tl.arange(0, BLOCK)
    j = program % columns * BLOCK + tl.arange(0, BLOCK)
    steps = tl.cdiv(tl.cdiv(value.positions, POSITIONS), chunks)
    square = tl.zeros((BLOCK,), tl.float32)
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        n = (part % chunks * steps + step) * POSITIONS + tl.arange(0, POSITIONS)
        residual = _residual(attention, value, target, head, heads, n, i, R, POSITIONS, PRECISION)
        gram += tiles.dot(tl.trans(residual), tiles.widen(tile_of(value, head, heads, n, j, C)), PRECISION)
        square += tl.sum(residual * residual, 0)
    at = sums + part * (R * C + R)
    tiles.store(at + i[:, None] * C + j[None, :], gram, (i < R)[:, None] & (j < C)[None, :])
    tiles.store(at + R * C + i, square, i < R)  # by every block of columns, the same
    tile = program % (rows * columns)
    _settle(
        distances, of_attention, sums, counters, sample, head, tile, rows * columns, elements, heads, chunks, i, j, R, C, BLOCK
    )  # fmt: skip


@triton.jit(do_not_specialize=["factor_stride", "gain", "heads", "workers", "R", "C"])
def _residual_mix(
    out,
    matrix,  # of a first term, or None
    first_map,
    attention,
    value,
    target,
    direct,  # (B,) int32: which samples
    factor,  # (B,)
    factor_stride: tl.int64,
    gain,
    heads,
    workers,
    R,
    C,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = gain * factor * (attention^T @ residual + matrix @ first_map).

    The `workers` programs of a head share its blocks of channels and positions: few, as nearly always they return at once.
    """
    tiles.start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    blocks, strips = tl.cdiv(C, BLOCK), tl.cdiv(out.positions, POSITIONS)
    head = program // workers
    if tl.load(direct + head // heads) == 0:
        return
    for item in range(program % workers, blocks * strips, workers):
        j = item % blocks * BLOCK + tl.arange(0, BLOCK)
        n = item // blocks * POSITIONS + tl.arange(0, POSITIONS)
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
        sums *= gain * tiles.load(factor + head // heads * factor_stride, True)
        store_tile(out, sums, head, heads, n, j, C)


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _tiles(r: int, c: int) -> int:
    return tiles.cdiv(r, SUMS["BLOCK"]) * tiles.cdiv(c, SUMS["BLOCK"])


def residual_counters(shape: tuple[int, ...]) -> int:
    """How many zeros `launch_residual_sums` needs."""
    batch, heads, r, c = shape
    return batch * heads * _tiles(r, c) + batch


def launch_residual_sums(
    attention: Tensor,
    of_attention: Tensor,
    value: Tensor,
    target: Tensor,
    parts: Tensor,
    counters: Tensor,
    elements: int,
) -> tuple[Tensor, Tensor]:
    """-> distance (B,), and which samples are close (B,) int32; of those `of_attention`, residual value^T, is written again."""
    batch, heads, r, c = attention.shape
    v, t = features(value), features(target)
    blocks = _tiles(r, c)
    chunks = tiles.chunks(v.positions, batch * heads * blocks, value.device)
    sums = attention.new_empty((batch * heads, chunks, r * c + r))
    distances, close = value.new_empty(batch), counters.new_empty(batch)
    _residual_sums[(batch * heads * chunks * blocks,)](
        distances,
        close,
        of_attention,
        features(attention.flatten(0, 1)),
        v,
        t,
        parts,
        sums,
        counters,
        elements,
        parts.shape[1],
        CLOSE,
        heads,
        chunks,
        r,
        c,
        tiles.next_power_of_2(parts.shape[1]),
        PRECISION=tiles.precision(),
        **SUMS,
        **tiles.early(),
        **tiles.OPTIONS,
    )
    return distances, close


def launch_residual_mix(
    out: Tensor,
    term: tuple[Tensor, Tensor] | None,
    attention: Tensor,
    value: Tensor,
    target: Tensor,
    direct: Tensor,
    factor: Tensor,
    gain: float,
) -> None:
    batch, heads, r, c = attention.shape
    to = features(out)
    tile = {"BLOCK": 32 if on_amd() else 64, "POSITIONS": 32, "num_warps": 8}
    items = tiles.cdiv(c, tile["BLOCK"]) * tiles.cdiv(to.positions, tile["POSITIONS"])
    workers = min(items, tiles.cdiv(2 * tiles.multiprocessors(out.device), batch * heads))
    _residual_mix[(batch * heads * workers,)](
        to,
        None if term is None else features(term[0].flatten(0, 1)),
        None if term is None else features(term[1]),
        features(attention.flatten(0, 1)),
        features(value),
        features(target),
        direct,
        factor,
        factor.stride(0),
        gain,
        heads,
        workers,
        r,
        c,
        PRECISION=tiles.precision(),
        **tile,
        **tiles.early(),
        **tiles.OPTIONS,
    )
