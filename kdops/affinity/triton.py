# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The affinity distance as Triton kernels, in the two forms of cpu.py: by Grams in triton_grams.py, by tiles here.

By tiles, D = S^T S - T^T T is formed a tile at a time and never held.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import GradientColumns
from ..tiles import features
from .spec import by_grams
from .triton_columns import Packed, at, columns_of, pack, step_of, through_norms
from .triton_grams import launch_gram, launch_gram_gradients

WIDEST = 128  # channels of a gradient that one program sums up


@triton.jit
def _products(
    packed, batch, i, j, NETWORK: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Cosines of the positions i and j in one network, (i, j)."""
    first = 0 if NETWORK == 0 else packed.teacher
    end = packed.teacher if NETWORK == 0 else packed.channels
    rows, columns = at(packed, batch, i), at(packed, batch, j)
    sums = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for begin in tl.range(first, end, DEPTH, num_stages=STAGES):
        c = begin + tl.arange(0, DEPTH)[None, :]
        sums += tiles.dot(tl.load(rows + c), tl.trans(tl.load(columns + c)), PRECISION)
    factors = packed.factors + (batch * 2 + NETWORK) * packed.positions
    return sums * (tl.load(factors + i).to(tl.float32)[:, None] * tl.load(factors + j).to(tl.float32)[None, :])


@triton.jit(do_not_specialize=["blocks"])
def _tile_distances(
    packed, partial, blocks, P: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """One program: a tile on or above the diagonal. Both networks are multiplied in one order: equal ones differ by exactly 0."""
    program = tl.program_id(0).to(tl.int64)
    tiles_of_sample = blocks * (blocks + 1) // 2
    batch = program // tiles_of_sample
    # The triangle folded into a rectangle: its row r holds the tiles of row r and of row blocks - 1 - r.
    r = program % tiles_of_sample // (blocks + 1)
    c = program % tiles_of_sample % (blocks + 1)
    folded = c >= blocks - r
    row = tl.where(folded, blocks - 1 - r, r)
    column = tl.where(folded, row + c - (blocks - r), r + c)
    i, j = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    difference = _products(packed, batch, i, j, 0, DEPTH, STAGES, PRECISION)
    difference -= _products(packed, batch, i, j, 1, DEPTH, STAGES, PRECISION)
    terms = tl.sum(tl.abs(difference) if P == 1 else difference * difference, 0)
    one = program + tl.zeros((1,), tl.int64)
    tiles.store(
        partial + one, tl.sum(terms, 0) * tl.where(row == column, 1.0, 2.0) + tl.zeros((1,), tl.float32), one >= 0
    )


@triton.jit
def _tile_gradients(
    packed,
    sums,  # (B, positions, channels of the network) float32
    values,  # the packed columns of the network, as Features
    slices,
    P: tl.constexpr,
    NETWORK: tl.constexpr,
    C: tl.constexpr,  # channels of the network, padded
    PARTS: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[i] = sum over j of the slope of |D_ij|^P (over P) times normalised column j; one program: some i and a slice of the channels."""
    program = tl.program_id(0).to(
        tl.int64
    )  # positions vary fastest: programs that run together stream the same columns
    strips = packed.positions // SIDE
    first = program // strips % slices * (PARTS[0] + PARTS[1])
    batch = program // (strips * slices)
    i = program % strips * SIDE + tl.arange(0, SIDE)
    factors = packed.factors + (batch * 2 + NETWORK) * packed.positions
    total = tiles.zero_features(SIDE, PARTS)
    for begin in range(0, packed.positions, SIDE):
        j = begin + tl.arange(0, SIDE)
        difference = _products(packed, batch, i, j, 0, DEPTH, STAGES, PRECISION)
        difference -= _products(packed, batch, i, j, 1, DEPTH, STAGES, PRECISION)
        # For p=1 the sign: 0 at a tie and, as in torch, where D is not a number.
        slope = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32) if P == 1 else difference
        weights = slope * tl.load(factors + j).to(tl.float32)[None, :]
        column = tiles.load_features(values, batch, j, None, first, C, PARTS)
        total = tiles.add_product(total, weights, column, PARTS, PRECISION)
    out = sums + (batch * packed.positions + i)[:, None] * C
    c = first + tl.arange(0, PARTS[0])[None, :]
    tiles.store(out + c, total[0], c < C)
    if PARTS[1] > 0:
        c = first + PARTS[0] + tl.arange(0, PARTS[1])[None, :]
        tiles.store(out + c, total[1], c < C)


class Tile(NamedTuple):
    """Sides of a tile of positions by positions, and its steps in channels."""

    side: int
    depth: int
    warps: int
    stages: int


def tile_for(dtype: torch.dtype, *, gradients: bool) -> Tile:
    """Small enough that no register spills."""
    if dtype == torch.float32 and tiles.architecture() == "cuda:80":  # operands lie in registers, three times over
        return Tile(32, step_of(dtype), 8, 2) if gradients else Tile(64, step_of(dtype) // 2, 8, 2)
    if dtype == torch.float32 and gradients and tiles.architecture() == "cuda:90":
        return Tile(
            32, step_of(dtype), 8, 2
        )  # eight warps have no 64 rows each (spatial_attention/table.py), and four spill
    if dtype == torch.float32:
        return Tile(64, step_of(dtype), 8 if gradients else 4, 2)
    return Tile(64, step_of(dtype), 8, 2) if gradients else Tile(128, step_of(dtype), 8, 3)


def _launch_tile_gradients(packed: Packed, p: int, network: int) -> Tensor:
    values = columns_of(packed, network)
    batch, channels, positions = values.shape
    tile = tile_for(values.dtype, gradients=True)
    slices = tiles.cdiv(channels, WIDEST)
    sums = packed.scales.new_empty((batch, positions, channels))
    _tile_gradients[(batch * slices * positions // tile.side,)](
        packed,
        sums,
        features(values),
        slices,
        p,
        network,
        channels,
        tiles.parts(tiles.cdiv(channels, slices)),
        tile.side,
        tile.depth,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.OPTIONS,
    )
    return sums


def affinity_distance(student: Tensor, teacher: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    """-> the sum over all pairs of positions (B,) float32; Grams (B, Cs + Ct, Cs + Ct) float64, or (0,)."""
    if student.shape[0] == 0:
        channels = student.shape[1] + teacher.shape[1]
        shape = (0, channels, channels) if by_grams(student, teacher, p) else (0,)
        return student.new_empty(0, dtype=torch.float32), student.new_empty(shape, dtype=torch.float64)
    packed = pack(student, teacher, eps, by_grams(student, teacher, p))
    if by_grams(student, teacher, p):
        grams = launch_gram(packed, student.shape[1], teacher.shape[1])
        squares, cs = grams.square(), student.shape[1]
        same = squares[:, :cs, :cs].sum((1, 2)) + squares[:, cs:, cs:].sum((1, 2))
        distance = same - 2 * squares[:, :cs, cs:].sum((1, 2))
        return distance.clamp(min=0).float(), grams  # rounding may leave a tiny negative number
    tile = tile_for(student.dtype, gradients=False)
    blocks = packed.positions // tile.side
    partial = packed.scales.new_empty((student.shape[0], blocks * (blocks + 1) // 2))
    _tile_distances[(partial.numel(),)](
        packed,
        partial,
        blocks,
        p,
        tile.side,
        tile.depth,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.OPTIONS,
    )
    return partial.sum(1, dtype=torch.float64).float(), student.new_empty(0, dtype=torch.float64)


def affinity_distance_backward(
    grad: Tensor,
    grams: Tensor,
    student: Tensor,
    teacher: Tensor,
    p: int,
    eps: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of student and teacher."""
    found = GradientColumns(student, need_student), GradientColumns(teacher, need_teacher)
    if student.shape[0] > 0 and (need_student or need_teacher):
        packed = pack(student, teacher, eps, by_grams(student, teacher, p))
        factor = 2 * p * grad.float()  # both of a pair of columns have a share in their product
        for network, of_maps in enumerate(found):
            if not of_maps.needed:
                continue
            if by_grams(student, teacher, p):
                sums = launch_gram_gradients(packed, grams, student.shape[1], teacher.shape[1], network)
            else:
                sums = _launch_tile_gradients(packed, p, network)
            upstream = factor if network == 0 or by_grams(student, teacher, p) else -factor
            through_norms(packed, sums, upstream, of_maps.columns, network)
    return found[0].finish(), found[1].finish()
