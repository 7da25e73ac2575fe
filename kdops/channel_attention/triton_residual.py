# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The residual of channel attention, formed tile by tile: for samples so close to their target that Grams would cancel."""

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import features
from .triton_products import store_tile, tile_of

CLOSE = 2**-5  # below this part of the target's square, the distance by Grams has lost five bits or more
MIX = {"BLOCK": 64, "POSITIONS": 32, "num_warps": 8}
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


@triton.jit(do_not_specialize=["count", "bound", "heads", "chunks", "R", "C"])
def _residual_sums(
    attention,
    value,
    target,
    parts,  # (B, count, 2) float64: they tell which samples are close
    sums,  # (heads, chunks, R * C + R) float32: residual value^T, and the residual's squares
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
):
    """One program: a block of channels of the target and one of the value, over a chunk of the positions."""
    program = tl.program_id(0).to(tl.int64)
    rows, columns = tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK)
    part = program // (rows * columns)  # counts the chunks of all heads
    head = part // chunks
    _, direct = distance_of(parts, head // heads, count, bound, COUNT)
    if direct == 0:
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
):
    """out = gain * factor * (attention^T @ residual + matrix @ first_map).

    The `workers` programs of a head share its blocks of channels and positions: few, as nearly always they return at once.
    """
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


def launch_residual_sums(attention: Tensor, value: Tensor, target: Tensor, parts: Tensor) -> Tensor:
    """Of close samples, residual value^T and the residual's squares, (B * heads, chunks, R * C + R)."""
    batch, heads, r, c = attention.shape
    v, t = features(value), features(target)
    blocks = triton.cdiv(r, SUMS["BLOCK"]) * triton.cdiv(c, SUMS["BLOCK"])
    chunks = tiles.chunks(v.positions, batch * heads * blocks, value.device)
    sums = attention.new_empty((batch * heads, chunks, r * c + r))
    _residual_sums[(batch * heads * chunks * blocks,)](
        features(attention.flatten(0, 1)),
        v,
        t,
        parts,
        sums,
        parts.shape[1],
        CLOSE,
        heads,
        chunks,
        r,
        c,
        triton.next_power_of_2(parts.shape[1]),
        PRECISION=tiles.precision(),
        **SUMS,
        **tiles.OPTIONS,
    )
    return sums


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
    items = triton.cdiv(c, MIX["BLOCK"]) * triton.cdiv(to.positions, MIX["POSITIONS"])
    workers = min(items, triton.cdiv(2 * tiles.multiprocessors(out.device), batch * heads))
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
        **MIX,
        **tiles.OPTIONS,
    )
