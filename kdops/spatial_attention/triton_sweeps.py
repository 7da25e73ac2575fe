# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The sweeps of spatial attention, as Triton kernels.

Every pass is one of two sweeps: a program keeps a block of rows (positions of one map) on chip while all columns (positions of the
other) pass by. Which map gives the rows depends on whose positions the result has:

    result                            rows    columns
    out, gradient of the query        query   key
    gradients of key and value        key     query

`_attend` sums weighted features of the columns; `_slopes` sums them weighted by the gradient of the logits. No two programs write one
number, so the same input gives the same bits.

Exponentials are to the base 2. Every softmax keeps two numbers, with which a weight is exp2(logit * scale - level - log_sum): the level is
its highest logit, scaled and rounded, and log_sum the logarithm of its sum relative to that. In one number the second would be rounded as
coarsely as the first. The level is subtracted within one fused multiply-add, which rounds neither the product nor anything near the
highest logit: the rounding of the level itself multiplies all weights of a softmax alike, and leaves with their sum. It is at most half
a unit in the last place, a factor of 2^64 for scaled logits of 2^31: up to there, 1e9 to the base e (1e8 in float16), nothing overflows.
"""

import triton
import triton.language as tl

from .. import tiles


@triton.jit
def _number(numbers, features, row, n, inside):
    """The n-th of each row of as many as there are positions; `inside` says which there are, or is None where all are."""
    pointers = numbers + row * features.positions + n
    return tl.load(pointers) if inside is None else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _softmaxes(statistics, features, batch, n, inside, TOGETHER: tl.constexpr):
    """Level and log_sum of each position n, which lie side by side; TOGETHER: by one load."""
    if TOGETHER:
        both = _number(statistics.to(tl.pointer_type(tl.int64)), features, batch, n, inside)
        level = both.to(tl.int32).to(tl.float32, bitcast=True)
        log_sum = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        level = _number(statistics, features, 2 * batch, 2 * n, inside)
        log_sum = _number(statistics, features, 2 * batch, 2 * n + 1, inside)
    return level, log_sum


@triton.jit
def _masked(logits, inside, NEGATIVE: tl.constexpr):
    if NEGATIVE:
        logits = -logits
    if inside is not None:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _given_weights(logits, level, log_sum, inside, scale, NEGATIVE: tl.constexpr):
    """Of columns whose softmaxes are known."""
    return tl.exp2(tiles.fma(_masked(logits, inside, NEGATIVE), scale, -level[None, :]) - log_sum[None, :])


@triton.jit
def _weights(logits, level, total, inside, scale, NEGATIVE: tl.constexpr):
    """Relative to the level of each row so far; by how much what was relative to the one before shrinks; level and total now.

    One instruction an element scales and subtracts.
    """
    logits = _masked(logits, inside, NEGATIVE)
    before = level
    level = tl.maximum(before, tl.max(logits, 1) * scale)
    finite = tl.where(level == float("-inf"), 0.0, level)  # no column so far has any weight
    weights = tl.exp2(tiles.fma(logits, scale, -finite[:, None]))
    shrink = tl.exp2(before - finite)
    return weights, shrink, level, total * shrink + tl.sum(weights, 1)


@triton.jit
def _add_weighted(sums, shrink, weights, value, GIVEN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    if not GIVEN:
        sums = tiles.scale_features(sums, shrink, PARTS)
    return tiles.add_product(sums, weights, value, PARTS, PRECISION)


@triton.jit
def _attend(
    rows,
    columns,
    values,  # of the columns; None: the columns themselves
    out,  # at the rows, or None where only statistics are wanted
    statistics,  # float32 levels and log_sums: written, (B, rows, 2), or given, (B, columns, 2)
    scale,  # of the logits to the base 2; positive
    NEGATIVE: tl.constexpr,  # the logits change their sign before
    GIVEN: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    CV: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches beyond the last column
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    LATE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """out[r] = sum over columns c of a[r, c] values[c], where a is the softmax of a row, or (GIVEN) of a column with known statistics.

    LATE: values are added a tile late, so that tensor cores multiply them while the next tile's weights are made.
    TOGETHER: level and log_sum of a given softmax are loaded as one number.
    """
    batch, first_row, piece = tiles.place(rows, ROWS, SLICES)
    channel = piece * VALUE_PARTS[0]
    r = first_row + tl.arange(0, ROWS)
    row_inside = r < rows.positions
    row = tiles.load_features(rows, batch, r, row_inside, 0, C, PARTS)
    level = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tiles.zero_features(ROWS, VALUE_PARTS)
    if LATE:
        weights = tl.zeros((ROWS, COLUMNS), tl.float32)
        shrink = total
    for first in tl.range(0, columns.positions, COLUMNS, num_stages=STAGES):
        c = first + tl.arange(0, COLUMNS)
        inside = None if EVEN else c < columns.positions
        column = tiles.load_features(columns, batch, c, inside, 0, C, PARTS)
        logits = tiles.products(rows, batch, r, row_inside, row, columns, batch, c, inside, column, C, PARTS, PRECISION)
        if LATE:
            value = tiles.load_features(values, batch, c - COLUMNS, c >= COLUMNS, channel, CV, VALUE_PARTS)
            sums = _add_weighted(sums, shrink, weights, value, GIVEN, VALUE_PARTS, PRECISION)
        if GIVEN:
            given_level, log_sum = _softmaxes(statistics, columns, batch, c, inside, TOGETHER)
            weights = _given_weights(logits, given_level, log_sum, inside, scale, NEGATIVE)
            shrink = total
        else:
            weights, shrink, level, total = _weights(logits, level, total, inside, scale, NEGATIVE)
        if out is not None and not LATE:
            value = column
            if values is not None:
                value = tiles.load_features(values, batch, c, inside, channel, CV, VALUE_PARTS)
            sums = _add_weighted(sums, shrink, weights, value, GIVEN, VALUE_PARTS, PRECISION)
    if LATE:
        last = (tl.cdiv(columns.positions, COLUMNS) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        value = tiles.load_features(values, batch, last, last < columns.positions, channel, CV, VALUE_PARTS)
        sums = _add_weighted(sums, shrink, weights, value, GIVEN, VALUE_PARTS, PRECISION)
    if not GIVEN:
        sums = tiles.scale_features(sums, 1 / total, VALUE_PARTS)
        if statistics is not None:
            pointers = statistics + 2 * (batch * rows.positions + r)
            tiles.store(pointers, level, r < rows.positions)
            tiles.store(pointers + 1, tl.log2(total), r < rows.positions)
    if out is not None:
        tiles.store_features(out, sums, batch, r, channel, CV, VALUE_PARTS)


@triton.jit
def _slopes(
    rows,
    row_values,  # None: the rows are their own values, and `gradient` is that of both roles
    columns,
    column_values,  # None: the columns themselves
    statistics,  # (B, rows, 2) float32, or (B, columns, 2) if BY_COLUMN, whose softmax it is
    delta,  # (B, rows) or (B, columns): sum of weights times their gradients, times the scale; written where gradient is None
    gradient,  # at the rows, or None where only delta is wanted
    scale,  # of the logits
    scale_2,  # of the logits to the base 2
    BY_COLUMN: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    CV: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """gradient[r] = sum over columns c of s[r, c] columns[c], s = scale a[r, c] (row_values[r] . column_values[c] - delta).

    Values and upstream gradient meet in the same product, whichever of them the rows hold. Rows that are their own values
    receive a[r, c] column_values[c] besides, in the same accumulator.

    AHEAD: the columns' log_sums are loaded by hand a tile ahead; what the compiler loads ahead lies in shared memory.
    TOGETHER: level and log_sum of a column are loaded as one number.
    """
    batch, first_row, piece = tiles.place(rows, ROWS, SLICES)
    channel = piece * SLICE_PARTS[0]
    r = first_row + tl.arange(0, ROWS)
    APART: tl.constexpr = (
        SLICES > 1 or PARTS[0] + PARTS[1] < C
    )  # logits and sums take different channels of the columns
    row_inside = r < rows.positions
    row = tiles.load_features(rows, batch, r, row_inside, 0, C, PARTS)
    value_rows, row_value = rows, row
    if row_values is not None:
        value_rows = row_values
        row_value = tiles.load_features(row_values, batch, r, row_inside, 0, CV, VALUE_PARTS)
    if not BY_COLUMN:
        level, log_sum = _softmaxes(statistics, rows, batch, r, row_inside, False)
        level, log_sum = level[:, None], log_sum[:, None]
        if gradient is not None:
            mean = _number(delta, rows, batch, r, row_inside)[:, None]
    if AHEAD:
        c = tl.arange(0, COLUMNS)
        next_log_sum = _number(statistics, columns, 2 * batch, 2 * c + 1, c < columns.positions)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tiles.zero_features(ROWS, SLICE_PARTS)
    for first in tl.range(0, columns.positions, COLUMNS, num_stages=STAGES):
        c = first + tl.arange(0, COLUMNS)
        inside = None if EVEN else c < columns.positions
        column = tiles.load_features(columns, batch, c, inside, 0, C, PARTS)
        value_columns, column_value = columns, column
        if column_values is not None:
            value_columns = column_values
            column_value = tiles.load_features(column_values, batch, c, inside, 0, CV, VALUE_PARTS)
        logits = tiles.products(rows, batch, r, row_inside, row, columns, batch, c, inside, column, C, PARTS, PRECISION)
        slopes = tiles.products(
            value_rows,
            batch,
            r,
            row_inside,
            row_value,
            value_columns,
            batch,
            c,
            inside,
            column_value,
            CV,
            VALUE_PARTS,
            PRECISION,
        )
        if BY_COLUMN:
            if AHEAD:
                level, log_sum = _number(statistics, columns, 2 * batch, 2 * c, inside), next_log_sum
                after = c + COLUMNS
                next_log_sum = _number(statistics, columns, 2 * batch, 2 * after + 1, after < columns.positions)
            else:
                level, log_sum = _softmaxes(statistics, columns, batch, c, inside, TOGETHER)
            level, log_sum = level[None, :], log_sum[None, :]
            mean = _number(delta, columns, batch, c, inside)[None, :]
        weights = tl.exp2(tiles.fma(logits, scale_2, -level) - log_sum)
        slopes = weights * (slopes * scale if gradient is None else slopes * scale - mean)
        if inside is not None:
            weights = tl.where(inside[None, :], weights, 0.0)
            slopes = tl.where(inside[None, :], slopes, 0.0)
        if gradient is None:
            total += tl.sum(slopes, 1)
        else:
            if APART:
                column = tiles.load_features(columns, batch, c, inside, channel, C, SLICE_PARTS)
            sums = tiles.add_product(sums, slopes, column, SLICE_PARTS, PRECISION)
            if row_values is None:
                if APART:
                    column_value = tiles.load_features(column_values, batch, c, inside, channel, CV, SLICE_PARTS)
                sums = tiles.add_product(sums, weights, column_value, SLICE_PARTS, PRECISION)
    if gradient is None:
        tiles.store(delta + batch * rows.positions + r, total, r < rows.positions)
    else:
        tiles.store_features(gradient, sums, batch, r, channel, C, SLICE_PARTS)


@triton.jit
def _delta(out, grad, delta, scale, C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """delta[r] = scale times the sum over channels of out[r] grad[r]."""
    batch, first_row, _ = tiles.place(out, ROWS, 1)
    r = first_row + tl.arange(0, ROWS)
    inside = r < out.positions
    a = tiles.load_features(out, batch, r, inside, 0, C, PARTS)
    b = tiles.load_features(grad, batch, r, inside, 0, C, PARTS)
    total = tl.sum(tiles.widen(a[0]) * tiles.widen(b[0]), 1)
    if PARTS[1] > 0:
        total += tl.sum(tiles.widen(a[1]) * tiles.widen(b[1]), 1)
    tiles.store(delta + batch * out.positions + r, total * scale, inside)
