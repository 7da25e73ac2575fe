# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""Packed columns, from which both forms of the affinity distance start: a row of channels for each position.

Student and teacher lie side by side, each column times the power of two that brings its largest number to between 1 and 2, so that no
square overflows. That is exact in every dtype, so products of 16-bit features run on tensor cores and lose nothing; the norms are factors
of the result. Columns of float32 tiles are divided by their norms right away, which rounds them as the reference does. Positions and
channels are padded with zeros to whole tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import features

SIDE = 128  # positions are padded to a multiple


class Packed(NamedTuple):
    """Columns of both networks as kernels take them: students' channels come first, teachers' begin at `teacher`."""

    columns: Tensor  # (B, positions, channels)
    factors: Tensor  # (B, 2, positions) float64: columns times their factor are normalised
    scales: Tensor  # (B, 2, positions) float32: columns are maps times these
    positions: int
    channels: int
    teacher: int


@triton.jit
def _power(largest):
    """The power of two that brings a float32 to between 1 and 2 (to 4 from 2^127 on; from the smallest numbers, as far as it goes)."""
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, power, 1.0)


@triton.jit
def at(packed, batch, n):
    """Where the positions n of a sample begin."""
    return packed.columns + (batch * packed.positions + n)[:, None] * packed.channels


@triton.jit(do_not_specialize=["eps", "C"])
def _pack(
    map, packed, eps, C, NETWORK: tl.constexpr, NORMALISE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """One program: all channels (C, then zeros) of some positions of one network."""
    program = tl.program_id(0).to(tl.int64)
    strips = packed.positions // POSITIONS
    batch = program // strips
    n = program % strips * POSITIONS + tl.arange(0, POSITIONS)
    inside = n < map.positions
    first = 0 if NETWORK == 0 else packed.teacher
    end = packed.teacher if NETWORK == 0 else packed.channels
    largest = tl.zeros((POSITIONS,), tl.float32)
    for begin in range(0, end - first, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)
        x = tiles.load(tiles._pointers(map, batch, n, c), inside[:, None] & (c < C)[None, :])
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    scale = _power(largest)
    squares = tl.zeros((POSITIONS,), tl.float64)
    for begin in range(0, end - first, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)
        x = tiles.load(tiles._pointers(map, batch, n, c), inside[:, None] & (c < C)[None, :]) * scale[:, None]
        if not NORMALISE:
            tiles.store(at(packed, batch, n) + first + c[None, :], x, (c < end - first)[None, :])
        wide = x.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
    norm = tl.sqrt(squares)
    divisor = tl.where(norm < float("inf"), norm + eps * scale.to(tl.float64), float("nan"))
    factor = 1 / divisor
    if NORMALISE:
        for begin in range(0, end - first, CHANNELS):
            c = begin + tl.arange(0, CHANNELS)
            x = tiles.load(tiles._pointers(map, batch, n, c), inside[:, None] & (c < C)[None, :]) * scale[:, None]
            # A division, not a product with the reciprocal: a number divided by itself is exactly 1, as in the reference.
            hat = tl.where(inside[:, None], (x.to(tl.float64) / divisor[:, None]).to(tl.float32), 0.0)
            tiles.store(at(packed, batch, n) + first + c[None, :], hat, (c < end - first)[None, :])
        scale = (scale * factor).to(tl.float32)
        factor = tl.full((POSITIONS,), 1.0, tl.float64)
    row = (batch * 2 + NETWORK) * packed.positions + n
    tiles.store(packed.factors + row, tl.where(inside, factor, 0.0), n < packed.positions)
    tiles.store(packed.scales + row, scale, n < packed.positions)


@triton.jit(do_not_specialize=["C"])
def _through_norms(
    packed,
    sums,  # (B, positions, channels of the network) float32: the gradient of the normalised columns, but for the factor
    factor,  # (B,) float32
    gradient,  # the map to write
    C,
    NETWORK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """From the gradient of normalised columns to that of the map; a norm of 0 has the gradient 0, as in torch."""
    program = tl.program_id(0).to(tl.int64)
    strips = packed.positions // POSITIONS
    batch = program // strips
    n = program % strips * POSITIONS + tl.arange(0, POSITIONS)
    first = 0 if NETWORK == 0 else packed.teacher
    end = packed.teacher if NETWORK == 0 else packed.channels
    columns = at(packed, batch, n) + first
    of_hat = sums + (batch * packed.positions + n)[:, None] * (end - first)
    row = (batch * 2 + NETWORK) * packed.positions + n
    normalise = tiles.load(packed.factors + row, n < packed.positions)
    upstream = tl.load(factor + batch)
    squares = tl.zeros((POSITIONS,), tl.float64)  # of normalised columns they may be too small for float32
    inner = tl.zeros((POSITIONS,), tl.float32)
    for begin in range(0, end - first, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)[None, :]
        x = tiles.load(columns + c, c < end - first)
        wide = x.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
        inner += tl.sum(x * tiles.load(of_hat + c, c < end - first), 1)
    along = tl.where(squares == 0, 0.0, inner / tl.sqrt(squares).to(tl.float32)) * normalise
    divide = upstream * normalise * tiles.load(packed.scales + row, n < packed.positions)
    for begin in range(0, end - first, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)
        x = tiles.load(columns + c[None, :], (c < end - first)[None, :])
        g = tiles.load(of_hat + c[None, :], (c < end - first)[None, :])
        inside = (n < gradient.positions)[:, None] & (c < C)[None, :]
        tiles.store(tiles._pointers(gradient, batch, n, c), (g - x * along[:, None]) * divide[:, None], inside)


def step_of(dtype: torch.dtype) -> int:
    """Channels are padded to a multiple: as many as products of tiles take at a time."""
    return 32 if dtype == torch.float32 else 64


def pack(student: Tensor, teacher: Tensor, eps: float, grams: bool) -> Packed:
    """For tiles or for Grams: normalised only for tiles of float32.

    For Grams always float32: triton 3.6 cannot multiply float64 that it has seen loaded as 16 bits.
    """
    batch, positions = student.shape[0], tiles.cdiv(student.shape[2:].numel(), SIDE) * SIDE
    step = step_of(student.dtype)
    cs, ct = (tiles.cdiv(t.shape[1], step) * step for t in (student, teacher))
    normalise = student.dtype == torch.float32 and not grams
    packed = Packed(
        student.new_empty((batch, positions, cs + ct), dtype=torch.float32 if grams else None),
        student.new_empty((batch, 2, positions), dtype=torch.float64),
        student.new_empty((batch, 2, positions), dtype=torch.float32),
        positions,
        cs + ct,
        cs,
    )
    for network, maps in enumerate((student, teacher)):
        _pack[(batch * positions // 32,)](
            features(maps), packed, eps, maps.shape[1], network, normalise, 32, 16, num_warps=4, **tiles.OPTIONS
        )
    return packed


def columns_of(packed: Packed, network: int) -> Tensor:
    """(B, channels, positions) of one network."""
    own = packed.columns[..., : packed.teacher] if network == 0 else packed.columns[..., packed.teacher :]
    return own.mT


def through_norms(packed: Packed, sums: Tensor, factor: Tensor, gradient: Tensor, network: int) -> None:
    """Write the gradient of a map (B, C, N) = factor (B,) times that of its normalised columns, sums (B, positions, channels)."""
    grid = (packed.columns.shape[0] * packed.positions // 32,)
    _through_norms[grid](
        packed, sums, factor, features(gradient), gradient.shape[1], network, 32, 32, num_warps=4, **tiles.OPTIONS
    )
