"""The affinity distance on the CPU, in two forms.

By tiles, in C++ (csrc/affinity.cpp): O(N^2 C), each tile of the N x N matrices made, used and forgotten in cache; where the matrix has no
more numbers than both maps, its slopes are kept for backward.

By Grams (p=2, many positions): O(N C^2), by the matrix products of channel attention over strips of columns (those of torch's library
have other bits for other numbers of threads). With S and T the normalised columns of student
and teacher, the distance is ||S S^T||^2 - 2 ||S T^T||^2 + ||T T^T||^2 and its gradient 4 (S S^T S - S T^T T). Both are small differences of
large numbers where the networks agree, hence float64: features that differ by 1e-4 still leave eight digits, and equal ones give 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..channel_attention.cpu import gram, mixed
from ..layout import GradientColumns
from ..registration import LIBRARY, accumulator, op
from .spec import by_grams, keeps_slopes

# Maps (B, C, N) of any strides and dtype -> normalised columns and their norms (B, N), in the accumulator or in float64; and back.
LIBRARY.define("affinity_columns(Tensor maps, float eps, bool wide) -> (Tensor, Tensor)")
LIBRARY.define(
    "affinity_columns_backward(Tensor(a!) out, Tensor of_hat, Tensor hat, Tensor norms, float eps, Tensor factor) -> ()"
)

# Normalised columns (B, C, N) -> (B,) float64 and the slopes of D, (B, N padded, N padded) or (0,); backward: sum_j slope(D_ij) column_j
# as (B, N padded, C padded), or (0,) if not needed.
LIBRARY.define("affinity_tiles(Tensor student, Tensor teacher, int p, bool keep_slopes) -> (Tensor, Tensor)")
LIBRARY.define(
    "affinity_tiles_backward(Tensor student, Tensor teacher, Tensor slopes, int p, bool need_student, bool need_teacher)"
    " -> (Tensor, Tensor)"
)

STRIP = 2**17  # numbers in a strip of columns: 1 MiB in float64


def affinity_distance(student: Tensor, teacher: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    """-> the sum over all pairs of positions (B,), float32 or, for float64 inputs, float64; for backward the Grams (B, Cs + Ct, Cs + Ct),
    slopes (B, N padded, N padded) or nothing (0,).
    """
    wide = accumulator(student)
    if by_grams(student, teacher, p):
        kept = _grams(student, teacher, eps)
        ss, st, tt = _blocks(kept, student)
        distance = _squares(ss) - 2 * _squares(st) + _squares(tt)
        distance = distance.clamp(min=0)  # rounding may leave a tiny negative number
    else:
        hats = _Columns(student, eps, wide).hat, _Columns(teacher, eps, wide).hat
        distance, kept = op("affinity_tiles")(*hats, p, keeps_slopes(student, teacher, p))
    return distance.to(wide), kept


def affinity_distance_backward(
    grad: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor,
    p: int,
    eps: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of student and teacher."""
    of_student, of_teacher = GradientColumns(student, need_student), GradientColumns(teacher, need_teacher)
    factor = 2 * p * grad  # (B,); both of a pair of columns have a share in their product
    if by_grams(student, teacher, p):
        _backward_by_grams(factor.double(), kept, student, teacher, eps, of_student, of_teacher)
    else:
        _backward_by_tiles(factor, kept, student, teacher, p, eps, of_student, of_teacher)
    return of_student.finish(), of_teacher.finish()


class _Columns:
    """Columns (B, C, N) divided by their norm + eps: as reference.normalised, but for the way back by hand."""

    def __init__(self, maps: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.eps = eps
        self.hat, self.norm = op("affinity_columns")(maps.flatten(2), eps, dtype == torch.float64)

    def gradient(self, of_hat: Tensor, factor: Tensor, out: Tensor) -> None:
        """From the gradient of `hat` to `factor` (B,) times that of the columns, written to `out`."""
        op("affinity_columns_backward")(out, of_hat, self.hat, self.norm, self.eps, factor)


def _backward_by_tiles(
    factor: Tensor,
    slopes: Tensor,
    student: Tensor,
    teacher: Tensor,
    p: int,
    eps: float,
    of_student: GradientColumns,
    of_teacher: GradientColumns,
) -> None:
    both = _Columns(student, eps, accumulator(student)), _Columns(teacher, eps, accumulator(teacher))
    sums = op("affinity_tiles_backward")(both[0].hat, both[1].hat, slopes, p, of_student.needed, of_teacher.needed)
    for sign, columns, of_maps, total in zip((1, -1), both, (of_student, of_teacher), sums, strict=True):
        if of_maps.needed:
            _, channels, positions = columns.hat.shape
            columns.gradient(total[:, :positions, :channels].mT, sign * factor, of_maps.columns)


# --- by Grams --------------------------------------------------------------------------------------------------------------------


def _squares(gram: Tensor) -> Tensor:
    return gram.square().sum(dim=(1, 2))


def _strips(student: Tensor, teacher: Tensor, eps: float) -> Iterator[tuple[slice, _Columns, _Columns]]:
    """Some columns at a time, in float64."""
    s, t = student.flatten(2), teacher.flatten(2)
    width = max(256, STRIP // max(1, s.shape[0] * (s.shape[1] + t.shape[1])))
    for begin in range(0, s.shape[2], width):
        strip = slice(begin, begin + width)
        yield strip, _Columns(s[..., strip], eps, torch.float64), _Columns(t[..., strip], eps, torch.float64)


def _blocks(grams: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S S^T (B, Cs, Cs), S T^T (B, Cs, Ct), T T^T (B, Ct, Ct); the fourth block would be the second again."""
    cs = student.shape[1]
    return grams[:, :cs, :cs], grams[:, :cs, cs:], grams[:, cs:, cs:]


def _grams(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """(B, Cs + Ct, Cs + Ct) float64."""
    channels = student.shape[1] + teacher.shape[1]
    grams = student.new_zeros((student.shape[0], channels, channels), dtype=torch.float64)
    ss, st, tt = _blocks(grams, student)
    for _, s, t in _strips(student, teacher, eps):
        for block, x, y in ((ss, s, s), (st, s, t), (tt, t, t)):
            block += gram(x.hat, y.hat)
    return grams


def _backward_by_grams(
    factor: Tensor,
    grams: Tensor,
    student: Tensor,
    teacher: Tensor,
    eps: float,
    of_student: GradientColumns,
    of_teacher: GradientColumns,
) -> None:
    ss, st, tt = _blocks(grams, student)
    minus = -st
    for strip, s, t in _strips(student, teacher, eps):
        if of_student.needed:
            s.gradient(mixed(ss, s.hat, minus, t.hat), factor, of_student.columns[..., strip])
        if of_teacher.needed:
            t.gradient(mixed(tt, t.hat, minus.mT, s.hat), factor, of_teacher.columns[..., strip])
