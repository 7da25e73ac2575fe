# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The Gaussian distance as Triton kernels: one launch reads all taps, whatever their shapes, and one small launch finishes their sums.

The programs of a launch are numbered through: first those of the first tap, then those of the second, and so on; a program finds its
tap by its number. Within a tap they are numbered by sample, then by chunk of the features.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import flat_rows, gradient_rows, settle
from .reference import ADAPTIVE_FLOOR
from .spec import REDUCTIONS

FEATURES = 1024  # of a tile of gradients
SUMMED = 2048  # features of a tile whose squares are summed up
MAX_STEPS = 4  # tiles of a chunk, all loaded at once
# Of variances: 0 means adaptive, and that is what float32 makes of the square of a sigma below 1e-22.
SMALLEST = 2.0**-126
PROGRAMS = 16  # on a multiprocessor, where there is enough work
ROWS, COLUMNS = 16, 512  # of a tile of partial sums, at most: few, so that all loads are under way at once


@triton.jit
def _locate(number, sizes, B, CHUNK: tl.constexpr):
    """The tap of a program, its sample, and the first feature of its chunk."""
    number = number.to(tl.int64)
    tap = 0
    begin = number * 0
    size = begin + sizes[0]
    end = begin
    for t in tl.static_range(len(sizes)):
        here = number >= end
        tap = tl.where(here, t, tap)
        begin = tl.where(here, end, begin)
        size = tl.where(here, sizes[t], size)
        end += B * tl.cdiv(sizes[t] + begin * 0, CHUNK)
    chunks = tl.cdiv(size, CHUNK)
    return tap, size, (number - begin) // chunks, (number - begin) % chunks * CHUNK


@triton.jit
def _select(pointers, tap):
    """pointers[tap], for a tap that only the program knows."""
    chosen = pointers[0]
    for t in tl.static_range(1, len(pointers)):
        chosen = tl.where(tap == t, pointers[t], chosen)
    return chosen


# --- distances -------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B"])
def _squares(
    xs,  # for each tap (B, F_t)
    ys,
    sizes,  # F_t
    partial,  # (programs,) float32
    B,
    STEPS: tl.constexpr,
    FEATURES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the sum of squares over one chunk of one sample, which is STEPS tiles of FEATURES."""
    tiles.start(EARLY)
    tap, size, row, first = _locate(tl.program_id(0), sizes, B, STEPS * FEATURES)
    x = _select(xs, tap) + row * size
    y = _select(ys, tap) + row * size
    sums = tl.zeros((FEATURES,), tl.float32)
    for step in tl.static_range(STEPS):
        f = first + step * FEATURES + tl.arange(0, FEATURES)
        difference = tiles.load(x + f, f < size) - tiles.load(y + f, f < size)
        sums += difference * difference
    tiles.store(partial + tl.program_id(0), tl.sum(sums, 0), True)


@triton.jit
def _row_sums(partial, rows, B, chunks, COLUMNS: tl.constexpr):
    """The sums over the chunks of some rows of partial (B, chunks)."""
    sums = tl.zeros((rows.shape[0], COLUMNS), tl.float32)
    for begin in range(0, chunks, COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        inside = (rows < B)[:, None] & (c < chunks)[None, :]
        sums += tiles.load(partial + rows[:, None] * chunks + c[None, :], inside)
    return tl.sum(sums, 1)  # at the end, because threads meet for it


@triton.jit
def _minus_expm1_of_minus(z):
    """1 - exp(-z) for z >= 0. Below 1/2 by its series, to 9 terms (1e-9): the difference would cancel there."""
    series = 1 - z / 9
    for n in tl.static_range(8, 1, -1):
        series = 1 - z / n * series
    return tl.where(z < 0.5, z * series, 1 - tl.exp(-z))


@triton.jit(do_not_specialize=["B"])
def _finish(
    partial,  # for each tap (B, chunks_t) float32, one after the other
    firsts,  # where each begins
    chunks,  # chunks_t
    counts,  # what each sum of squares is divided by: F_t for a mean
    variances,  # sigma_t^2; 0 for adaptive
    distance,  # (T, B), or (T,) where it is reduced, in the dtype of the taps
    slope,  # (T, B) float32
    rate,  # (T,) float32
    B,
    REDUCTION: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: all samples of one tap."""
    tiles.start(EARLY)
    tap = tl.program_id(0)
    partial += _select(firsts, tap)
    n = _select(chunks, tap)
    count = _select(counts, tap)
    variance = _select(variances, tap)
    if variance == 0:
        total = 0.0
        for first in range(0, B, ROWS):
            total += tl.sum(_row_sums(partial, first + tl.arange(0, ROWS), B, n, COLUMNS) / count, 0)
        variance = total / B + FLOOR
    per_square = 1 / (2 * variance * count)
    tiles.store(rate + tap, per_square, True)
    share = 1.0
    if REDUCTION == "mean":
        share /= B
    total = 0.0
    for first in range(0, B, ROWS):
        rows = first + tl.arange(0, ROWS)
        exponent = _row_sums(partial, rows, B, n, COLUMNS) * per_square
        distances = _minus_expm1_of_minus(exponent) * share
        out = tap.to(tl.int64) * B + rows
        if REDUCTION == "none":
            tiles.store(distance + out, distances, rows < B)
        else:
            total += tl.sum(tl.where(rows < B, distances, 0.0), 0)
        tiles.store(slope + out, per_square * tl.exp(-exponent) * share, rows < B)
    if REDUCTION != "none":
        tiles.store(distance + tap, total, True)


def gaussian_distance(
    x: Sequence[Tensor], y: Sequence[Tensor], sigma: Sequence[float] | None, mean: bool, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Taps (B, *F_t) -> distance (T, B), or reduced (T,), in their dtype; its derivative by the sums of squares (T, B); the rate (T,)."""
    batch = x[0].shape[0]
    distance = x[0].new_empty((len(x), batch) if REDUCTIONS[reduction] == "none" else len(x))
    slope = x[0].new_empty((len(x), batch), dtype=torch.float32)
    rate = x[0].new_empty(len(x), dtype=torch.float32)
    if batch == 0:
        return distance.zero_(), slope, rate.zero_()
    pairs = [flat_rows(a, b, (1, 1)) for a, b in zip(x, y, strict=True)]
    sizes = tuple(a.shape[1] for a, _ in pairs)
    steps, chunks = _chunks(sizes, batch, x[0].device)
    firsts = [0]
    for n in chunks:
        firsts.append(firsts[-1] + batch * n)
    partial = x[0].new_empty(firsts[-1], dtype=torch.float32)
    if firsts[-1]:
        xs, ys = (tuple(side) for side in zip(*pairs, strict=True))
        _squares[(firsts[-1],)](
            xs, ys, sizes, partial, batch, steps, SUMMED, num_warps=8, **tiles.early(), **tiles.OPTIONS
        )
    _finish[(len(x),)](
        partial,
        tuple(firsts[:-1]),
        chunks,
        tuple(float(size if mean else 1) for size in sizes),
        (0.0,) * len(x) if sigma is None else tuple(max(s * s, SMALLEST) for s in sigma),
        distance,
        slope,
        rate,
        batch,
        REDUCTIONS[reduction],
        ADAPTIVE_FLOOR,
        ROWS,
        min(COLUMNS, tiles.next_power_of_2(max(*chunks, 16))),
        num_warps=8,
        **tiles.early(),
        **tiles.OPTIONS,
    )
    return distance, slope, rate


def _chunks(sizes: Sequence[int], batch: int, device: torch.device) -> tuple[int, tuple[int, ...]]:
    """Tiles of a chunk, a power of two so that few kernels are compiled, and chunks of a sample of each tap."""
    tiles_of_all = batch * sum(tiles.cdiv(size, SUMMED) for size in sizes)
    wanted = tiles.cdiv(tiles_of_all, tiles.multiprocessors(device) * PROGRAMS)
    steps = min(MAX_STEPS, tiles.next_power_of_2(max(wanted, 1)))
    return steps, tuple(tiles.cdiv(size, steps * SUMMED) for size in sizes)


# --- gradients -------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "stride_tap", "stride_row"])
def _gradients(
    xs,  # for each tap (B, F_t)
    ys,
    grads_x,  # the same shapes, or None where they are not needed
    grads_y,
    sizes,  # F_t
    numbers,  # of the taps, in grad and slope
    grad,  # (T, B), any strides
    slope,  # (T, B) float32
    B,
    stride_tap: tl.int64,
    stride_row: tl.int64,
    FEATURES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one tile of one sample, 2 grad slope (x - y) and its negative.

    From the end to the beginning: what `_squares` has read last may still be in the L2 cache.
    """
    tiles.start(EARLY)
    tap, size, row, first = _locate(tl.num_programs(0) - 1 - tl.program_id(0), sizes, B, FEATURES)
    f = first + tl.arange(0, FEATURES)
    at = row * size + f
    difference = tiles.load(_select(xs, tap) + at, f < size) - tiles.load(_select(ys, tap) + at, f < size)
    number = _select(numbers, tap).to(tl.int64)
    factor = 2 * tiles.load(slope + number * B + row, True)
    factor *= tiles.load(grad + number * stride_tap + row * stride_row, True)
    gradient = factor * difference
    if grads_x is not None:
        tiles.store(_select(grads_x, tap) + at, gradient, f < size)
    if grads_y is not None:
        tiles.store(_select(grads_y, tap) + at, -gradient, f < size)


def gaussian_distance_backward(
    grad: Tensor,
    slope: Tensor,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    need_x: Sequence[bool],
    need_y: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """grad and slope (T, B), taps (B, *F_t) -> the gradients of x and y, (0,) where one is not needed.

    One launch for each kind of need.
    """
    slope = slope.contiguous()
    pairs = [flat_rows(a, b, (1, 1)) for a, b in zip(x, y, strict=True)]
    grads_x = [_Gradient(t, flat, need) for t, (flat, _), need in zip(x, pairs, need_x, strict=True)]
    grads_y = [_Gradient(t, flat, need) for t, (_, flat), need in zip(y, pairs, need_y, strict=True)]
    needs = list(zip(need_x, need_y, strict=True))
    for wanted in ((True, True), (True, False), (False, True)):
        taps = [t for t, need in enumerate(needs) if need == wanted and x[t].numel()]
        if not taps:
            continue
        sizes = tuple(pairs[t][0].shape[1] for t in taps)
        batch = slope.shape[1]
        _gradients[(batch * sum(tiles.cdiv(size, FEATURES) for size in sizes),)](
            tuple(pairs[t][0] for t in taps),
            tuple(pairs[t][1] for t in taps),
            tuple(grads_x[t].rows for t in taps) if wanted[0] else None,
            tuple(grads_y[t].rows for t in taps) if wanted[1] else None,
            sizes,
            tuple(taps),
            grad,
            slope,
            batch,
            *grad.stride(),
            FEATURES,
            num_warps=4,
            **tiles.early(),
            **tiles.OPTIONS,
        )
    return [g.settled() for g in grads_x], [g.settled() for g in grads_y]


class _Gradient:
    """The gradient of a tap, to be written as `rows`; of no elements where it is not needed."""

    def __init__(self, tap: Tensor, flat: Tensor, needed: bool) -> None:
        self.gradient, self.rows = gradient_rows(tap, flat) if needed else (tap.new_empty(0),) * 2

    def settled(self) -> Tensor:
        return settle(self.gradient, self.rows)
