# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The cross-entropy over a codebook as Triton kernels.

`_sweep` and `_slopes` keep a block of rows (positions of student and teacher) on chip while all codes pass by; `_code_sums` keeps a block
of codes while a group of rows passes by. Logits stay in registers. No two programs write one number, so the same input gives
the same bits. Logits, exponentials and statistics are to the base 2.
"""

from __future__ import annotations

from math import e, log, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..layout import settle
from ..registration import gradient_like
from ..tiles import features
from .table import Tile, in_one_sweep, tile_for

# --- kernels ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_codes(codes, offsets, k, C: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of codes, and -e.e / t of each; -infinity where there is none."""
    inside = None if EVEN else k < codes.positions
    tile = tiles.load_features(codes, 0, k, inside, 0, C, PARTS)
    return tile, tl.load(offsets + k, mask=k < codes.positions, other=float("-inf"))


@triton.jit
def _finite(x, exists, EVEN: tl.constexpr):
    """x, but 0 for codes that do not exist: their weight of 0 times -infinity would be NaN."""
    if not EVEN:
        x = tl.where(exists, x, 0.0)
    return x


@triton.jit
def _sweep(
    student,
    teacher,
    codes,
    offsets,
    loss,  # (M,) float32
    statistics,  # (5, M) float32: maximum and sum of the student, of the teacher, and the teacher's mean of x (see below)
    slopes,  # of the student, float32, at the rows; None: not wanted
    count: tl.int64,  # M
    scale,
    to_loss,  # ln(2)
    factor,  # of the slopes
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both softmaxes and the cross-entropy, with x the student's logits minus their running maximum: no term of the loss is negative.

    And, where PARTS hold all channels, the student's slopes[r] = sum over codes of (p - q) code. With u, v the exponentials and U, V their
    sums so far, p = u / U and q = v / V, and the slopes are A / U with A the sum of (u - v U / V) code: weights are small where student and
    teacher agree, so rounding them costs no digits there. As U / V changes, A moves by a multiple of B, the sum of v code.
    """
    batch, first_row, _ = tiles.place(student, ROWS, 1)
    r = first_row + tl.arange(0, ROWS)
    inside = r < student.positions
    s = tiles.load_features(student, batch, r, inside, 0, C, PARTS)
    t = tiles.load_features(teacher, batch, r, inside, 0, C, PARTS)
    s_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    t_maximum = s_maximum
    s_sum = tl.zeros((ROWS,), tl.float32)
    t_sum = s_sum
    expected = s_sum
    ratio = s_sum
    difference = tiles.zero_features(ROWS, PARTS)  # A
    of_teacher = tiles.zero_features(ROWS, PARTS)  # B
    for first in tl.range(0, codes.positions, CODES, num_stages=STAGES):
        k = first + tl.arange(0, CODES)
        exists = None if EVEN else k < codes.positions
        code, offset = _load_codes(codes, offsets, k, C, PARTS, EVEN)
        s_logits = tiles.products(student, batch, r, inside, s, codes, 0, k, exists, code, C, PARTS, PRECISION)
        s_logits = s_logits * scale + offset[None, :]
        t_logits = tiles.products(teacher, batch, r, inside, t, codes, 0, k, exists, code, C, PARTS, PRECISION)
        t_logits = t_logits * scale + offset[None, :]
        s_before, t_before = s_maximum, t_maximum
        s_maximum = tl.maximum(s_before, tl.max(s_logits, 1))
        t_maximum = tl.maximum(t_before, tl.max(t_logits, 1))
        x = s_logits - s_maximum[:, None]
        v = tl.exp2(t_logits - t_maximum[:, None])
        terms = v * _finite(x, (k < codes.positions)[None, :], EVEN)
        u = tl.exp2(x)
        moved = tl.where(t_sum > 0, s_before - s_maximum, 0.0)  # what lies behind had larger x
        s_shrink = tl.exp2(s_before - s_maximum)
        t_shrink = tl.exp2(t_before - t_maximum)
        expected = (expected + t_sum * moved) * t_shrink + tl.sum(terms, 1)
        t_sum = t_sum * t_shrink + tl.sum(v, 1)
        s_sum = s_sum * s_shrink + tl.sum(u, 1)
        if slopes is not None:
            before = ratio
            ratio = s_sum / t_sum
            moved_by = tiles.scale_features(of_teacher, s_shrink * before - t_shrink * ratio, PARTS)
            difference = tiles.scale_features(difference, s_shrink, PARTS)
            difference = difference[0] + moved_by[0], difference[1] + moved_by[1]
            difference = tiles.add_product(difference, u - v * ratio[:, None], code, PARTS, PRECISION)
            of_teacher = tiles.scale_features(of_teacher, t_shrink, PARTS)
            of_teacher = tiles.add_product(of_teacher, v, code, PARTS, PRECISION)
    if slopes is not None:
        difference = tiles.scale_features(difference, factor / s_sum, PARTS)
        tiles.store_features(slopes, difference, batch, r, 0, C, PARTS)
    expected = expected / t_sum
    m = batch * student.positions + r
    tiles.store(loss + m, (tl.log2(s_sum) - expected) * to_loss, inside)
    tiles.store(statistics + m, s_maximum, inside)
    tiles.store(statistics + count + m, s_sum, inside)
    tiles.store(statistics + 2 * count + m, t_maximum, inside)
    tiles.store(statistics + 3 * count + m, t_sum, inside)
    tiles.store(statistics + 4 * count + m, expected, inside)


@triton.jit
def _load_statistics(statistics, count, m, inside):
    """Maximum and inverse sum of the student, the same of the teacher, and the teacher's mean of x."""
    s_maximum = tiles.load(statistics + m, inside)
    s_sum = tl.load(statistics + count + m, mask=inside, other=1.0)
    t_maximum = tiles.load(statistics + 2 * count + m, inside)
    t_sum = tl.load(statistics + 3 * count + m, mask=inside, other=1.0)
    return s_maximum, 1 / s_sum, t_maximum, 1 / t_sum, tiles.load(statistics + 4 * count + m, inside)


@triton.jit
def _slopes(
    student,
    teacher,
    codes,
    offsets,
    statistics,
    slopes,  # float32, at the rows
    count: tl.int64,
    scale,
    factor,  # of the sums; for the teacher its x are to the base 2
    OF_TEACHER: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE_PARTS: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """slopes[r] = sum over codes of (p - q) code, or, of the teacher, of q (mean of x - x) code."""
    batch, first_row, piece = tiles.place(student, ROWS, SLICES)
    APART: tl.constexpr = SLICES > 1 or PARTS[0] + PARTS[1] < C  # logits and sums take different channels of the codes
    channel = piece * SLICE_PARTS[0]
    r = first_row + tl.arange(0, ROWS)
    inside = r < student.positions
    s = tiles.load_features(student, batch, r, inside, 0, C, PARTS)
    t = tiles.load_features(teacher, batch, r, inside, 0, C, PARTS)
    m = batch * student.positions + r
    s_maximum, s_inverse, t_maximum, t_inverse, expected = _load_statistics(statistics, count, m, inside)
    # Weights of the teacher are at most -expected: brought below 1, float16 holds them.
    level = tl.maximum(-expected, 1.0) if OF_TEACHER else tl.full((ROWS,), 1.0, tl.float32)
    sums = tiles.zero_features(ROWS, SLICE_PARTS)
    for first in tl.range(0, codes.positions, CODES, num_stages=STAGES):
        k = first + tl.arange(0, CODES)
        exists = None if EVEN else k < codes.positions
        code, offset = _load_codes(codes, offsets, k, C, PARTS, EVEN)
        x = tiles.products(student, batch, r, inside, s, codes, 0, k, exists, code, C, PARTS, PRECISION)
        x = x * scale + offset[None, :] - s_maximum[:, None]
        y = tiles.products(teacher, batch, r, inside, t, codes, 0, k, exists, code, C, PARTS, PRECISION)
        y = y * scale + offset[None, :] - t_maximum[:, None]
        q = tl.exp2(y) * t_inverse[:, None]
        if OF_TEACHER:
            x = _finite(x, (k < codes.positions)[None, :], EVEN)
            weights = q * ((expected[:, None] - x) / level[:, None])
        else:
            weights = tl.exp2(x) * s_inverse[:, None] - q
        if APART:
            code = tiles.load_features(codes, 0, k, exists, channel, C, SLICE_PARTS)
        sums = tiles.add_product(sums, weights, code, SLICE_PARTS, PRECISION)
    sums = tiles.scale_features(sums, level * factor, SLICE_PARTS)
    tiles.store_features(slopes, sums, batch, r, channel, C, SLICE_PARTS)


@triton.jit
def _code_sums(
    student,
    teacher,
    codes,
    offsets,
    statistics,
    upstream,  # (M,) float32, at most 1 in magnitude
    partial,  # (groups, D, K) float32
    count: tl.int64,
    blocks,  # of rows in all samples
    groups,
    scale,
    factor,
    x_factor,  # ln(2)
    SLICES: tl.constexpr,
    SLICE_PARTS: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the share that a group of rows has in the gradient of a block of codes."""
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    APART: tl.constexpr = SLICES > 1 or PARTS[0] + PARTS[1] < C  # logits and sums take different channels of the rows
    channel = program // groups % SLICES * SLICE_PARTS[0]
    k = program // (groups * SLICES) * CODES + tl.arange(0, CODES)
    exists = k < codes.positions
    code, offset = _load_codes(codes, offsets, k, C, PARTS, False)
    sums = tiles.zero_features(CODES, SLICE_PARTS)
    weight = tl.zeros((CODES,), tl.float32)
    per_sample = tl.cdiv(student.positions, ROWS)
    for block in tl.range(group * blocks // groups, (group + 1) * blocks // groups, num_stages=STAGES):
        batch = block // per_sample
        r = block % per_sample * ROWS + tl.arange(0, ROWS)
        inside = r < student.positions
        m = batch * student.positions + r
        s_maximum, s_inverse, t_maximum, t_inverse, expected = _load_statistics(statistics, count, m, inside)
        g = tiles.load(upstream + m, inside)[None, :]
        s = tiles.load_features(student, batch, r, inside, 0, C, PARTS)
        t = tiles.load_features(teacher, batch, r, inside, 0, C, PARTS)
        x = tiles.products(codes, 0, k, exists, code, student, batch, r, inside, s, C, PARTS, PRECISION)
        x = x * scale + offset[:, None] - s_maximum[None, :]
        x = _finite(x, exists[:, None], False)
        y = tiles.products(codes, 0, k, exists, code, teacher, batch, r, inside, t, C, PARTS, PRECISION)
        y = y * scale + offset[:, None] - t_maximum[None, :]
        q = tl.exp2(y) * (t_inverse[None, :] * g)
        of_student = tl.exp2(x) * (s_inverse[None, :] * g) - q
        of_teacher = q * ((expected[None, :] - x) * x_factor)
        if APART:
            s = tiles.load_features(student, batch, r, inside, channel, C, SLICE_PARTS)
            t = tiles.load_features(teacher, batch, r, inside, channel, C, SLICE_PARTS)
        sums = tiles.add_product(sums, of_student, s, SLICE_PARTS, PRECISION)
        sums = tiles.add_product(sums, of_teacher, t, SLICE_PARTS, PRECISION)
        weight += tl.sum(of_student + of_teacher, 1)
    if APART:
        code = tiles.load_features(codes, 0, k, exists, channel, C, SLICE_PARTS)
    own = tiles.scale_features((tiles.widen(code[0]), tiles.widen(code[1])), weight, SLICE_PARTS)
    difference = (sums[0] - own[0], sums[1] - own[1])
    result = tiles.scale_features(difference, tl.full((CODES,), 1.0, tl.float32) * factor, SLICE_PARTS)
    tiles.store_features(partial, result, group, k, channel, C, SLICE_PARTS)


# --- launches --------------------------------------------------------------------------------------------------------------------


PROGRAMS = 256  # of _code_sums, roughly: their number follows from the shapes alone


class _Problem(NamedTuple):
    """Student, teacher and codebook as kernels take them."""

    student: tiles.Features
    teacher: tiles.Features
    codes: tiles.Features
    offsets: Tensor  # (K,) float32
    scale: float  # of products, to the base 2

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float) -> _Problem:
        offsets = codebook.float().square().sum(dim=1).mul_(-log2(e) / temperature)
        s, t, codes = (features(_map(x)) for x in (student, teacher, codebook))
        return cls(s, t, codes, offsets, 2 * log2(e) / temperature)

    @property
    def positions(self) -> int:
        return self.student.data.shape[0] * self.student.positions


def _map(t: Tensor) -> Tensor:
    """(B, D, *S), or (M, D) as the one sample that it is: (1, D, M)."""
    return t.t().unsqueeze(0) if t.ndim == 2 else t


def _launch_rows(kernel, problem: _Problem, which: str, *args: object, tile: Tile | None = None) -> None:
    channels = problem.student.data.shape[1]
    tile = tile or tile_for(which, channels, problem.student.data.dtype)
    slices = 1 if kernel is _sweep else tiles.cdiv(channels, tile.slice)  # one sweep does not share channels
    result = () if kernel is _sweep else (slices, tiles.parts(min(channels, tile.slice)))
    kernel[(problem.student.data.shape[0] * slices * tiles.cdiv(problem.student.positions, tile.rows),)](
        problem.student,
        problem.teacher,
        problem.codes,
        problem.offsets,
        *args,
        *result,
        channels,
        tiles.parts(min(channels, tile.held)),
        tile.rows,
        tile.codes,
        problem.codes.positions % tile.codes == 0,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.OPTIONS,
    )


def codebook_cross_entropy(
    student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (M,), statistics (5, M), and slopes of the loss with the dense strides of student and teacher, (0,) where not needed."""
    problem = _Problem.of(student, teacher, codebook, temperature)
    count, scale, factor = problem.positions, problem.scale, 2 / temperature
    loss = student.new_empty(count, dtype=torch.float32)
    statistics = student.new_empty((5, count), dtype=torch.float32)
    slopes = [gradient_like(t, need, torch.float32) for t, need in ((student, need_student), (teacher, need_teacher))]
    columns = [
        _map(t).flatten(2) if t.numel() > 0 else t for t in slopes
    ]  # views, if positions are a fixed stride apart
    if count > 0:
        of_student, of_teacher = (features(t) if t.numel() > 0 else None for t in columns)
        at_once = of_student if in_one_sweep(student.shape[1], student.dtype) else None
        which = "statistics" if at_once is None else "student"
        _launch_rows(_sweep, problem, which, loss, statistics, at_once, count, scale, log(2), factor)
        if need_student and at_once is None:
            _launch_rows(_slopes, problem, "slopes", statistics, of_student, count, scale, factor, False)
        if need_teacher:
            _launch_rows(_slopes, problem, "slopes", statistics, of_teacher, count, scale, factor * log(2), True)
    return loss, statistics, settle(slopes[0], columns[0]), settle(slopes[1], columns[1])


def codebook_cross_entropy_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    codebook: Tensor,
    statistics: Tensor,
    student_slopes: Tensor,
    teacher_slopes: Tensor,
    temperature: float,
    need_student: bool,
    need_teacher: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (M,) float32 -> the gradients, (0,) where one is not needed."""
    of_codebook = codebook.new_empty(0)
    if need_codebook:
        problem = _Problem.of(student, teacher, codebook, temperature)
        of_codebook = torch.empty_like(codebook).copy_(_codebook_gradient(problem, statistics, grad, temperature))
    return (
        _row_gradient(student, student_slopes, grad, need_student),
        _row_gradient(teacher, teacher_slopes, grad, need_teacher),
        of_codebook,
    )


def _row_gradient(like: Tensor, slopes: Tensor, grad: Tensor, needed: bool) -> Tensor:
    gradient = gradient_like(like, needed)
    if needed:
        torch.mul(slopes, grad.reshape(like.shape[0], 1, *like.shape[2:]), out=gradient)
    return gradient


def _codebook_gradient(problem: _Problem, statistics: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """(K, D) float32: a sum over the rows of each group, then over the groups."""
    count, codes, channels = problem.positions, problem.codes.positions, problem.student.data.shape[1]
    tile = tile_for("code_sums", channels, problem.student.data.dtype)
    code_blocks = tiles.cdiv(codes, tile.codes)
    blocks = problem.student.data.shape[0] * tiles.cdiv(problem.student.positions, tile.rows)
    slices = tiles.cdiv(channels, tile.slice)
    groups = max(1, min(blocks, tiles.cdiv(PROGRAMS, code_blocks * slices)))
    largest = torch.cat([grad.abs(), grad.new_zeros(1)]).amax()
    upstream = torch.where(largest > 0, grad / largest, grad).contiguous()  # float16 has no digits for 1 / M
    partial = problem.offsets.new_empty((groups, codes, channels))
    _code_sums[(code_blocks * slices * groups,)](
        problem.student,
        problem.teacher,
        problem.codes,
        problem.offsets,
        statistics,
        upstream,
        features(partial.mT),
        count,
        blocks,
        groups,
        problem.scale,
        2 / temperature,
        log(2),
        slices,
        tiles.parts(min(channels, tile.slice)),
        channels,
        tiles.parts(min(channels, tile.held)),
        tile.rows,
        tile.codes,
        tile.stages,
        tiles.precision(),
        num_warps=tile.warps,
        **tiles.OPTIONS,
    )
    return partial.sum(dim=0) * largest
