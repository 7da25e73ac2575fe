# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The contrastive distances as Triton kernels.

All operators are one computation: G groups, each with B rows x and K rows y of F features, and every pair of rows within a group.
Pairwise distances are one group; matched distances are a group for each anchor, with B = 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import flat_rows, gradient_rows, settle

MAX_ROWS = 16  # rows of one operand that a program holds on chip at once
SYMMETRIC_ROWS = 8  # where x is y: smaller blocks, of which fewer pairs lie on the diagonal
MAX_STEPS = 256  # tiles that one sum adds up, which bounds the rounding error of very long rows
WARPS_PER_MULTIPROCESSOR = 24  # of the distances kernel, whose 80 registers a thread leave room for no more


# --- distances -------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "K", "steps", "chunks"])
def _distances(
    x,  # (G, B, F)
    y,  # (G, K, F)
    partial,  # (G, chunks, B, K) float32
    B,
    K,
    F: tl.int64,
    steps,
    chunks,
    P: tl.constexpr,
    ROWS_X: tl.constexpr,
    ROWS_Y: tl.constexpr,
    FEATURES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """One program: ROWS_X x ROWS_Y pairs over one chunk of the features, which is `steps` tiles of FEATURES.

    SYMMETRIC: x and y are one, each pair of blocks is visited once (on the diagonal, one beside it, and so on, around the end), and
    its sums are written to both of their places. The sum over features stays spread over the threads until the chunk is done, then is
    formed once.
    """
    program = tl.program_id(0).to(tl.int64)  # pairs vary fastest: programs that run together read the same features
    blocks_x = tl.cdiv(B, ROWS_X)
    blocks_y = tl.cdiv(K, ROWS_Y)
    if SYMMETRIC:
        blocks = blocks_x * (blocks_x + 1) // 2
        block_x = program % blocks % blocks_x
        block_y = (block_x + program % blocks // blocks_x) % blocks_x
    else:
        blocks = blocks_x * blocks_y
        block_x = program % blocks // blocks_y
        block_y = program % blocks_y
    i = block_x * ROWS_X + tl.arange(0, ROWS_X)
    k = block_y * ROWS_Y + tl.arange(0, ROWS_Y)
    part = program // blocks  # counts the chunks of all groups
    group = part // chunks
    x_rows = x + (group * B + i)[:, None] * F
    y_rows = y + (group * K + k)[:, None] * F
    sums = tl.zeros((ROWS_X, ROWS_Y, FEATURES), tl.float32)
    for step in tl.range(0, steps, num_stages=3):
        f = (part % chunks * steps + step) * FEATURES + tl.arange(0, FEATURES)[None, :]
        a = tiles.load(x_rows + f, (i < B)[:, None] & (f < F))
        b = tiles.load(y_rows + f, (k < K)[:, None] & (f < F))
        difference = a[:, None, :] - b[None, :, :]
        sums += tl.abs(difference) if P == 1 else difference * difference
    inside = (i < B)[:, None] & (k < K)[None, :]
    tiles.store(partial + (part * B + i)[:, None] * K + k[None, :], tl.sum(sums, 2), inside)
    if SYMMETRIC and block_x != block_y:
        tiles.store(partial + part * B * K + k[None, :] * K + i[:, None], tl.sum(sums, 2), inside)


def pairwise_distance(x: Tensor, y: Tensor | None, p: int) -> Tensor:
    """x (B, *F), y (K, *F) -> (B, K) float32; without y, of x to itself."""
    other = x if y is None else y
    return _distance(x, other, (1, x.shape[0], other.shape[0]), p, symmetric=y is None).squeeze(0)


def matched_distance(anchor: Tensor, others: Tensor, p: int) -> Tensor:
    """anchor (B, *F), others (B, K, *F) -> (B, K) float32."""
    return _distance(anchor, others, (others.shape[0], 1, others.shape[1]), p).squeeze(1)


def _distance(x: Tensor, y: Tensor, sizes: tuple[int, int, int], p: int, symmetric: bool = False) -> Tensor:
    """(G, B, K) float32: partial sums over chunks of the features, then their sum in a fixed order."""
    g, b, k = sizes
    x, y = _flat(x, y)
    f = x.shape[1]
    if 0 in (*sizes, f):
        return x.new_zeros(sizes, dtype=torch.float32)
    rows_x, rows_y = [min(_row_block(rows), SYMMETRIC_ROWS) if symmetric else _row_block(rows) for rows in (b, k)]
    # 32 features for 16 x 16 pairs to 512 for one: as many sums as the registers hold, and consecutive features in a warp.
    features = max(32, min(512, 2048 // (rows_x * rows_y)))
    warps = 8 if rows_x * rows_y == MAX_ROWS**2 else 4
    blocks_x, blocks_y = tiles.cdiv(b, rows_x), tiles.cdiv(k, rows_y)
    blocks = blocks_x * (blocks_x + 1) // 2 if symmetric else g * blocks_x * blocks_y
    all_steps = tiles.cdiv(f, features)
    programs = tiles.multiprocessors(x.device) * WARPS_PER_MULTIPROCESSOR // warps
    steps = min(MAX_STEPS, tiles.cdiv(all_steps * blocks, programs))
    chunks = tiles.cdiv(all_steps, steps)
    partial = x.new_empty((g, chunks, b, k), dtype=torch.float32)
    _distances[(blocks * chunks,)](
        x, y, partial, b, k, f, steps, chunks, p, rows_x, rows_y, features, symmetric, num_warps=warps, **tiles.OPTIONS
    )
    return partial.sum(dim=1)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(G * B, F) and (G * K, F); `y` has one leading axis more than `x` if its rows are grouped."""
    return flat_rows(x, y, (1, 1 + y.ndim - x.ndim))


def _row_block(rows: int) -> int:
    """A few sizes, so that few kernels are compiled."""
    return next(size for size in (1, 4, MAX_ROWS) if rows <= size or size == MAX_ROWS)


# --- gradients -------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "K", "stride_group", "stride_held", "stride_streamed"])
def _gradients(
    grad,  # (G, B, K) float32, any strides
    held,  # (G, B, F)
    streamed,  # (G, K, F)
    grad_held,  # like held, or None where it is not needed
    grad_streamed,  # like streamed, or None; only where one program holds all B rows
    B,
    K,
    F: tl.int64,
    stride_group: tl.int64,
    stride_held: tl.int64,
    stride_streamed: tl.int64,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: ROWS rows of one operand stay in registers, all K rows of the other pass by, over one tile of features."""
    program = tl.program_id(0).to(tl.int64)  # row blocks vary fastest: programs that run together stream the same tile
    blocks = tl.cdiv(B, ROWS)
    feature_tiles = tl.cdiv(F, FEATURES)
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    f = program // blocks % feature_tiles * FEATURES + tl.arange(0, FEATURES)
    group = program // (blocks * feature_tiles)
    tile = (group * B + i)[:, None] * F + f[None, :]
    inside = (i < B)[:, None] & (f < F)[None, :]
    a = tiles.load(held + tile, inside)
    weights = grad + group * stride_group + i * stride_held
    sums = tl.zeros((ROWS, FEATURES), tl.float32)
    for k in tl.range(0, K, num_stages=3):
        row = (group * K + k) * F + f
        b = tiles.load(streamed + row, f < F)[None, :]
        weight = tiles.load(weights + k * stride_streamed, i < B)[:, None]
        # For p=1 the sign of the difference: 0 at ties and where it is NaN, as in torch.
        slope = (a > b).to(tl.float32) - (a < b).to(tl.float32) if P == 1 else 2 * (a - b)
        terms = weight * slope
        if P == 2:  # rows past the end have weight 0, and 0 times an infinite difference is NaN
            terms = tl.where((i < B)[:, None], terms, 0.0)
        sums += terms
        if grad_streamed is not None:
            tiles.store(grad_streamed + row, -tl.sum(terms, 0), f < F)
    if grad_held is not None:
        tiles.store(grad_held + tile, sums, inside)


class _Operand(NamedTuple):
    rows: Tensor  # (G * group, F)
    group: int  # rows in a group
    stride: int  # of grad, from one of these rows to the next
    gradient: Tensor | None  # like rows, to be written; None where it is not needed


def pairwise_distance_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, p: int, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """grad (B, K), x (B, *F), y (K, *F) -> the gradients of x and y, (0,) where one is not needed; without y, that of x alone."""
    return _backward(grad.unsqueeze(0), x, x if y is None else y, p, need_x, need_y)


def matched_distance_backward(
    grad: Tensor, anchor: Tensor, others: Tensor, p: int, need_anchor: bool, need_others: bool
) -> tuple[Tensor, Tensor]:
    """grad (B, K), anchor (B, *F), others (B, K, *F) -> the gradients of both, (0,) where one is not needed."""
    return _backward(grad.unsqueeze(1), anchor, others, p, need_anchor, need_others)


def _backward(grad: Tensor, x: Tensor, y: Tensor, p: int, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    """grad (G, B, K), any strides. One launch wherever a program can hold all rows of one operand."""
    if 0 in (x.numel(), y.numel()):
        return _zeros(x, need_x), _zeros(y, need_y)
    flat_x, flat_y = _flat(x, y)
    grad_x, rows_x = gradient_rows(x, flat_x) if need_x else (x.new_empty(0), None)
    grad_y, rows_y = gradient_rows(y, flat_y) if need_y else (y.new_empty(0), None)
    a = _Operand(flat_x, grad.shape[1], grad.stride(1), rows_x)
    b = _Operand(flat_y, grad.shape[2], grad.stride(2), rows_y)
    if need_x and need_y and min(a.group, b.group) <= MAX_ROWS:
        held, streamed = (a, b) if a.group <= MAX_ROWS else (b, a)
        _launch_gradients(grad, held, streamed, p)
    else:
        if need_x:
            _launch_gradients(grad, a, b._replace(gradient=None), p)
        if need_y:
            _launch_gradients(grad, b, a._replace(gradient=None), p)
    return _settled(grad_x, rows_x), _settled(grad_y, rows_y)


def _launch_gradients(grad: Tensor, held: _Operand, streamed: _Operand, p: int) -> None:
    groups, features = grad.shape[0], held.rows.shape[1]
    rows = _row_block(held.group)
    tile = min(
        256, 1024 // rows
    )  # features; a single warp has 32 or fewer values a thread, and never waits for another
    grid = (groups * tiles.cdiv(held.group, rows) * tiles.cdiv(features, tile),)
    _gradients[grid](
        grad,
        held.rows,
        streamed.rows,
        held.gradient,
        streamed.gradient,
        held.group,
        streamed.group,
        features,
        grad.stride(0),
        held.stride,
        streamed.stride,
        p,
        rows,
        tile,
        num_warps=1,
        **tiles.OPTIONS,
    )


def _zeros(t: Tensor, needed: bool) -> Tensor:
    return torch.zeros_like(t) if needed else t.new_empty(0)


def _settled(gradient: Tensor, rows: Tensor | None) -> Tensor:
    return gradient if rows is None else settle(gradient, rows)
