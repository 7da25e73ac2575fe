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
from .triton import factor_of, shape_of
from .triton_products import Grams, launch_grams, launch_mix, same
from .triton_residual import launch_residual_mix, launch_residual_sums, residual_counters

ROWS = 16  # of a C x C matrix that a program works on
# Chunks of up to so many channels that programs sum for themselves: a launch that sums them, and the gap before it, take as long as all of
# `_compare`. Then DEPTH channels of the value are one program's, so that each reads few chunks of few numbers, all at once.
FEW_CHUNKS, FEW_CHANNELS = 32, 64
FEW_WARPS, FEW_AHEAD = 16, 16  # chunks whose loads are under way at once
DEPTH = 16

# --- C x C matrices ---------------------------------------------------------------------------------------------------------------
#
# Two kernels do all that is to be done on them, a block of rows each program: some ten small operators of torch took as long as the maps.


@triton.jit
def _over_chunks(matrix, at, inside, chunks, width, AHEAD: tl.constexpr):
    """Numbers `at` of a matrix, or of so many `width` apart their sum, in order; AHEAD loads are under way at a time."""
    if chunks is None:
        sums = tiles.load(matrix + at, inside)
    else:
        sums = tl.zeros(at.shape, tl.float32)
        for first in range(0, chunks, AHEAD):
            for chunk in tl.static_range(AHEAD):
                there = tl.full(at.shape, first + chunk, tl.int32) < chunks
                sums += tiles.load(matrix + (first + chunk) * width + at, inside & there)
    return sums


@triton.jit
def _add_square_product(
    sums, left, left_row, left_column, right, chunks, width, r, j, R, begin, K, C, DEPTH: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """sums (r, j) + left (R, begin to K), whose strides are given, times right (begin to K, C) in so many chunks, in full float32."""
    for first in range(begin, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(
            left + r[:, None] * left_row + k[None, :] * left_column, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0
        )
        b = _over_chunks(right, k[:, None] * C + j, (k < K)[:, None] & (j < C), chunks, width, AHEAD)
        sums += tiles.dot(a, b)
    return sums


@triton.jit(do_not_specialize=["scale", "chunks"])
def _compare(
    sums,  # (heads, chunks, width) float32: the Grams
    attention,  # (heads, R, C)
    of_attention,  # (heads, R, C): residual value^T
    parts,  # (heads, blocks, 2) float64: what a block of rows adds to the distance and to the target's square
    shares,  # (heads, blocks, SHARES, ROWS, COLUMNS) float32, or None: of attention value value^T, by channels of the value
    counters,  # (heads, blocks) int32, zeros
    scale,
    chunks,  # None: one
    width,
    R,
    C,
    VALUES,
    SQUARES,
    CROSS,  # None: the Gram of the logits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    SHARES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The attention, by a softmax of scaled Grams, and with it the distance and its gradient, a block of rows of one head.

    SHARES programs have the same rows, and DEPTH channels of the value each; the last of them adds up what they found.
    """
    tiles.start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    share, number = program % SHARES, program // SHARES
    blocks = tl.cdiv(R, ROWS)
    head = number // blocks
    r = number % blocks * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)[None, :]
    inside = (r < R)[:, None] & (j < C)
    at = r[:, None] * C + j
    grams = sums + head * (width if chunks is None else chunks * width)
    products = _over_chunks(grams, at, inside, chunks, width, AHEAD)
    cross = products if CROSS is None else _over_chunks(grams + CROSS, at, inside, chunks, width, AHEAD)
    square = tl.sum(_over_chunks(grams + SQUARES, r, r < R, chunks, width, AHEAD).to(tl.float64))
    logits = tl.where(j < C, products * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    own = attention + head * R * C
    tiles.store(own + at, weights, inside)  # by every share, the same
    tl.debug_barrier()  # the product reads rows that other threads have written
    first, end = 0, C
    if SHARES > 1:
        first, end = share * DEPTH, tl.minimum(C, (share + 1) * DEPTH)
    of_values = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_values = _add_square_product(
        of_values, own, C, 1, grams + VALUES, chunks, width, r, j, R, first, end, C, DEPTH, AHEAD
    )
    if SHARES > 1:
        in_share = tl.arange(0, ROWS)[:, None] * COLUMNS + j
        tiles.store(shares + program * ROWS * COLUMNS + in_share, of_values, True)
        if tiles.arrive(counters + number, SHARES) == 0:
            return
        of_values = tl.zeros((ROWS, COLUMNS), tl.float32)
        for n in tl.static_range(SHARES):
            found = shares + (number * SHARES + n) * ROWS * COLUMNS + in_share
            of_values += tl.load(found, cache_modifier=".cg")
    slopes = of_values - cross
    tiles.store(of_attention + head * R * C + at, slopes, inside)
    differences = weights.to(tl.float64) * (slopes.to(tl.float64) - cross.to(tl.float64))
    distance = square + tl.sum(tl.where(inside, differences, 0.0))
    tiles.store(parts + number * 2, distance, True)
    tiles.store(parts + number * 2 + 1, square, True)


@triton.jit(do_not_specialize=["scale"])
def _slopes(
    attention,  # (heads, R, C)
    of_attention,
    of_logits,  # (heads, R, C), or None
    less,  # of_logits - attention, or None
    square,  # attention^T attention (heads, C, C), or None
    scale,
    R,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What backward multiplies the maps with, a block of rows of one head: the gradient of the unscaled logits, or the square."""
    tiles.start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    of_slopes = tl.cdiv(R, ROWS)
    blocks = of_slopes + (0 if square is None else tl.cdiv(C, ROWS))
    head = program // blocks
    block = program % blocks
    j = tl.arange(0, COLUMNS)[None, :]
    own = attention + head * R * C
    if block < of_slopes:
        r = block * ROWS + tl.arange(0, ROWS)
        inside = (r < R)[:, None] & (j < C)
        at = r[:, None] * C + j
        weights = tiles.load(own + at, inside)
        weighted = weights * tiles.load(of_attention + head * R * C + at, inside)
        slopes = (weighted - weights * tl.sum(weighted, 1)[:, None]) * scale
        if of_logits is not None:
            tiles.store(of_logits + head * R * C + at, slopes, inside)
        if less is not None:
            tiles.store(less + head * R * C + at, slopes - weights, inside)
    elif square is not None:
        r = (block - of_slopes) * ROWS + tl.arange(0, ROWS)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = _add_square_product(sums, own, 1, C, own, None, None, r, j, C, 0, R, C, DEPTH, 1)
        tiles.store(square + head * C * C + r[:, None] * C + j, sums, (r < C)[:, None] & (j < C))


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _launch_compare(
    grams: Grams, shape: tuple[int, ...], scale: float, counters: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> attention, residual value^T, and what blocks of rows add to distance and square, (B, blocks, 2) float64."""
    batch, heads, r, c = shape
    sums, chunks = grams.sums, grams.sums.shape[1]
    if chunks > 1 and (chunks > FEW_CHUNKS or max(r, c) > FEW_CHANNELS):
        sums, chunks = sums.sum(1), 1
    attention = sums.new_empty(shape)
    of_attention = torch.empty_like(attention)
    blocks = tiles.cdiv(r, ROWS)
    parts = sums.new_empty((batch, heads * blocks, 2), dtype=torch.float64)
    launch = _by_rows(c)
    shares, of_shares = 1, None
    if chunks > 1:
        launch["num_warps"] = FEW_WARPS
        shares = tiles.cdiv(launch["COLUMNS"], DEPTH)
        of_shares = sums.new_empty((batch, heads, blocks, shares, ROWS, launch["COLUMNS"])) if shares > 1 else None
    _compare[(batch * heads * blocks * shares,)](
        sums,
        attention,
        of_attention,
        parts,
        of_shares,
        counters,
        scale,
        chunks if chunks > 1 else None,
        sums.shape[-1],
        r,
        c,
        *grams[1:],
        **launch,
        AHEAD=FEW_AHEAD,
        SHARES=shares,
        **tiles.early(),
        **tiles.OPTIONS,
    )
    return attention, of_attention, parts


def _by_rows(columns: int) -> dict[str, int]:
    width = max(16, tiles.next_power_of_2(columns))
    return {"ROWS": ROWS, "COLUMNS": width, "DEPTH": DEPTH, "num_warps": 4 if width <= 64 else 8}


# --- operators --------------------------------------------------------------------------------------------------------------------


def channel_attention_distance(
    query: Tensor, key: Tensor, value: Tensor | None, target: Tensor, scale: float | None, heads: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> distance (B,), attention and residual value^T (B, heads, Cq / heads, Ck / heads), and which samples are close (B,) int32."""
    shape = shape_of(query, key, heads)
    if query.shape[0] == 0:
        nothing = query.new_empty(shape, dtype=torch.float32)
        return query.new_empty(0), nothing, nothing.clone(), query.new_empty(0, dtype=torch.int32)
    of_residuals, of_rows = residual_counters(shape), query.shape[0] * heads * tiles.cdiv(shape[2], ROWS)
    counters = query.new_empty(of_residuals + of_rows, dtype=torch.int32)
    grams = launch_grams(query, key, heads, value, target, zeros=counters)
    attention, of_attention, parts = _launch_compare(grams, shape, factor_of(query, scale), counters[of_residuals:])
    v = key if value is None else value
    distance, close = launch_residual_sums(attention, of_attention, v, target, parts, counters, _elements(target, mean))
    return distance, attention, of_attention, close


def _elements(target: Tensor, mean: bool) -> int:
    return target.shape[1:].numel() if mean else 1


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
    mean: bool,
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
        gain = 2 / _elements(target, mean)
        by_value = need_value or (need_key and value is None)
        # The gradient of a student that is key and value, by the logits and as the value, has one factor for a target that is the query.
        together = need_key and value is None and same(query, target)
        of_logits, less, square = _launch_slopes(
            attention, of_attention, factor_of(query, scale), need_query or need_key, together, by_value
        )
        if need_query:
            launch_mix(of_query.columns, [(of_logits, key)], factor=grad, gain=gain)
        if need_key and value is not None:
            launch_mix(of_key.columns, [(of_logits.mT, query)], factor=grad, gain=gain)
        if by_value:
            term = None if value is not None else (of_logits.mT, query)
            terms = [(square, v), (less.mT if together else -attention.mT, target)]
            if term is not None and not together:
                terms.append(term)
            out = (of_key if value is None else of_value).columns
            launch_mix(out, terms, factor=grad, gain=gain, direct=close)
            launch_residual_mix(out, term, attention, v, target, close, grad, gain)
        if need_target:
            launch_mix(of_target.columns, [(attention, v)], minus=target, factor=grad, gain=-gain)
    return of_query.finish(), of_key.finish(), of_value.finish(), of_target.finish()


def _launch_slopes(
    attention: Tensor, of_attention: Tensor, scale: float, logits: bool, together: bool, by_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the logits, that less the attention, and attention^T attention; (0,) where one is not wanted."""
    batch, heads, r, c = attention.shape
    of_logits = torch.empty_like(attention) if logits else attention.new_empty(0)
    less = torch.empty_like(attention) if together else attention.new_empty(0)
    square = attention.new_empty((batch, heads, c, c) if by_value else 0)
    if logits or by_value:
        blocks = tiles.cdiv(r, ROWS) + (tiles.cdiv(c, ROWS) if by_value else 0)
        _slopes[(batch * heads * blocks,)](
            attention,
            of_attention,
            of_logits if logits else None,
            less if together else None,
            square if by_value else None,
            scale,
            r,
            c,
            **_by_rows(c),
            **tiles.early(),
            **tiles.OPTIONS,
        )
    return of_logits, less, square
