"""Affinity distance: how far apart two networks see the similarities between positions, without the N x N matrices."""

from __future__ import annotations

from math import prod

from torch import Tensor

from .. import checks, dispatch
from . import spec

__all__ = ["affinity_distance"]


def affinity_distance(
    student: Tensor, teacher: Tensor, *, p: int = 1, statistic: str = "mean", eps: float = 1e-8, backend: str = "auto"
) -> Tensor:
    r"""Distance between the cosine affinities of all pairs of positions in two feature maps, per sample.

    d[b] = mean or sum over positions i, j of |s_i . s_j - t_i . t_j|^p
    s_i = student[b, :, i] / (||student[b, :, i]|| + eps), t_i likewise

    p=1: time O(N^2 (Cs + Ct)), half of that of plain torch by symmetry. p=2: time O(N (Cs + Ct)^2) from C x C Gram matrices in float64, or
    as p=1 where there are at most 2 (Cs + Ct) positions. Memory O(N (Cs + Ct)) for both; plain torch holds N x N matrices.
    The gradient of |.| at a tie is 0, as in torch.

    Args:
        student: (B, Cs, *spatial) of N positions in one to three axes, float32, bfloat16 or float16 (float64 on the CPU and reference
            backends), any strides.
        teacher: (B, Ct, *spatial), the same positions; Ct may differ from Cs. Same dtype and device. Under autocast dtypes may differ
            and the distance runs in float32.
        p: 1 (L1, as FAKD) or 2 (squared L2).
        statistic: "mean" divides by N^2, "sum" does not.
        eps: added to the norms, in the unit of the features.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        (B,) in the dtype of the student (float32 under autocast), computed in float32 or better. Never negative.

    Raises:
        TypeError: not floating-point tensors of one dtype, or an eps that is no number.
        ValueError: shapes or devices that do not match, no channels or positions, an unknown p, statistic or backend, eps below 0.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: FAKD's spatial affinity, mean L1 over its N x N entries (methods.md 6, baseline 4); p=2 and statistic="sum" are ours.
    """
    op = "affinity_distance"
    checks.tensors(op, student=student, teacher=teacher)
    p = checks.choice(op, "p", p, (1, 2))
    checks.choice(op, "statistic", statistic, checks.STATISTICS)
    if not 3 <= student.ndim <= 5 or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise ValueError(
            f"{op}: student {checks.describe(student)} and teacher {checks.describe(teacher)}, but they must be (B, Cs, *spatial) and "
            "(B, Ct, *spatial) with the same B and one to three equal spatial axes."
        )
    if prod(student.shape[1:]) == 0 or teacher.shape[1] == 0:
        raise ValueError(
            f"{op}: student {checks.describe(student)} and teacher {checks.describe(teacher)}, but they must be of at least one channel "
            "and one position."
        )
    eps = checks.number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, but it must be a number of at least 0.")
    student, teacher = checks.for_distance(student, teacher)
    distance: Tensor = dispatch.implementation(op, (student, teacher), backend)(student, teacher, p, eps)
    if statistic == "mean":
        distance = distance / prod(student.shape[2:]) ** 2
    return distance.to(student.dtype)


spec.register(affinity_distance)
