# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The affinity distance by Grams (p=2, many positions) as Triton kernels.

With U the normalised columns of both networks and J = +1 for the student's channels, -1 for the teacher's, the distance is the sum of
J G^2 J over G = U U^T, and its gradient 4 J G J U. These are small differences of large numbers where the networks agree, hence in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .triton_columns import Packed, at, columns_of, step_of


@triton.jit
def _channel(packed, c, CS, CT):
    """The channel of U that packed channel c is, and whether it is one and not padding."""
    student = c < packed.teacher
    channel = tl.where(student, c, c - packed.teacher + CS)
    return channel, tl.where(student, c < CS, c < packed.teacher + CT)


@triton.jit
def _normalised(packed, batch, n, c, NETWORK):
    """Columns in float64, (n, c); c lies within one network."""
    values = tiles.widen(tl.load(at(packed, batch, n) + c[None, :])).to(tl.float64)
    return values * tl.load(packed.factors + (batch * 2 + NETWORK) * packed.positions + n)[:, None]


@triton.jit(do_not_specialize=["CS", "CT", "chunks"])
def _gram(
    packed, partial, CS, CT, chunks, BLOCK: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """partial (B, chunks, CS + CT, CS + CT) float64; one program: a block of channels by another over a chunk of the positions."""
    program = tl.program_id(0).to(tl.int64)
    blocks = packed.channels // BLOCK
    part = program // (blocks * blocks)
    batch = part // chunks
    first_row, first_column = program // blocks % blocks * BLOCK, program % blocks * BLOCK
    i, j = first_row + tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK)
    steps = tl.cdiv(packed.positions // POSITIONS, chunks)
    begin = part % chunks * steps * POSITIONS
    end = tl.minimum(begin + steps * POSITIONS, packed.positions)
    sums = tl.zeros((BLOCK, BLOCK), tl.float64)
    for first in tl.range(begin, end, POSITIONS, num_stages=STAGES):
        n = first + tl.arange(0, POSITIONS)
        a = _normalised(packed, batch, n, i, (first_row >= packed.teacher).to(tl.int64))
        b = _normalised(packed, batch, n, j, (first_column >= packed.teacher).to(tl.int64))
        sums += tiles.dot_double(tl.trans(a), b)
    row, row_inside = _channel(packed, i, CS, CT)
    column, column_inside = _channel(packed, j, CS, CT)
    channels = CS + CT
    out = partial + (part * channels + row)[:, None] * channels + column[None, :]
    tiles.store(out, sums, row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["CS", "CT"])
def _gram_gradients(
    packed,
    sums,  # (B, positions, channels of the network) float32
    grams,  # (B, CS + CT, CS + CT) float64
    CS,
    CT,
    NETWORK: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums = the network's rows of J G J U; one program: a block of channels at some positions."""
    program = tl.program_id(0).to(tl.int64)
    first_channel = 0 if NETWORK == 0 else packed.teacher
    width = packed.teacher if NETWORK == 0 else packed.channels - packed.teacher
    blocks, strips = width // BLOCK, packed.positions // POSITIONS
    batch = program // (blocks * strips)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = program // blocks % strips * POSITIONS + tl.arange(0, POSITIONS)
    channels = CS + CT
    column, column_inside = _channel(packed, first_channel + c, CS, CT)
    total = tl.zeros((POSITIONS, BLOCK), tl.float64)
    for first in tl.range(0, packed.channels, DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, DEPTH)
        network = (first >= packed.teacher).to(tl.int64)
        row, row_inside = _channel(packed, k, CS, CT)
        a = _normalised(packed, batch, n, k, network)
        b = tl.load(
            grams + (batch * channels + row)[:, None] * channels + column[None, :],
            mask=row_inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        total += tiles.dot_double(a, b * tl.where(network == NETWORK, 1.0, -1.0))
    tiles.store(sums + (batch * packed.positions + n)[:, None] * width + c[None, :], total, (c < width)[None, :])


def launch_gram(packed: Packed, cs: int, ct: int) -> Tensor:
    batch, block, positions = packed.columns.shape[0], min(64, packed.teacher, packed.channels - packed.teacher), 16
    if packed.teacher % block or packed.channels % block:
        block = step_of(packed.columns.dtype)
    blocks = (packed.channels // block) ** 2
    chunks = tiles.chunks(packed.positions, batch * blocks, packed.columns.device)
    partial = packed.factors.new_empty((batch, chunks, cs + ct, cs + ct))
    _gram[(batch * chunks * blocks,)](
        packed, partial, cs, ct, chunks, block, positions, 3, num_warps=4, **tiles.OPTIONS
    )
    return partial.sum(1)


def launch_gram_gradients(packed: Packed, grams: Tensor, cs: int, ct: int, network: int) -> Tensor:
    batch, channels, positions = columns_of(packed, network).shape
    sums = packed.scales.new_empty((batch, positions, channels))
    block = 64 if channels % 64 == 0 else 32
    _gram_gradients[(batch * (channels // block) * (positions // 64),)](
        packed, sums, grams, cs, ct, network, block, 64, 16, 3, num_warps=4, **tiles.OPTIONS
    )
    return sums
