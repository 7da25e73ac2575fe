"""Cross-entropy of two feature maps over a codebook in memory O(M D): no matrix of positions x codes is held."""

from __future__ import annotations

from math import inf, prod

from torch import Tensor

from .. import checks, dispatch
from ..sums import reduced
from . import spec

__all__ = ["codebook_cross_entropy"]


def codebook_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""How differently student and teacher choose among the codes of a codebook, at every position.

    loss[m] = -sum_k q[m, k] log p[m, k],   p[m, :] = softmax_k(-||student_m - code_k||^2 / temperature), q the same of the teacher

    Time O(M K D) for M positions, K codes and D channels; memory O(M D), where eager torch holds several M x K matrices.
    Only the gradients that are asked for are computed. The term ||student_m||^2 of a distance shifts all logits of a position alike, so it
    is left out, and the loss is summed from terms that are not negative: large features cost no digits there. Logits themselves are exact
    to about eps |student_m| |code_k| / temperature.

    Args:
        student: (B, D, *S) with one to three spatial axes, or (M, D), floating point (float32, bfloat16, float16; float64 on the CPU and
            reference backends), any strides.
        teacher: same shape, dtype and device.
        codebook: (K, D), same dtype and device. Under autocast dtypes may differ and the distance runs in float32.
        temperature: divides the squared distances, in their unit; above 0.
        reduction: "mean" over all positions, "sum", or "none".
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        A scalar, or (B, *S) or (M,) for reduction "none", in the dtype of student (float32 under autocast); accumulated in float32 or
        better.

    Raises:
        TypeError: not floating-point tensors of one dtype, or a temperature that is no number.
        ValueError: shapes or devices that do not match, no codes or no channels, a temperature that is not above 0 and finite, an unknown
            reduction or backend, no positions under "mean".
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the distribution mapping module of DCKD, L_ce in the form of the paper (methods.md 3a).
    """
    op = "codebook_cross_entropy"
    checks.tensors(op, student=student, teacher=teacher, codebook=codebook)
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    _check_shapes(op, student, teacher, codebook)
    temperature = checks.number(op, "temperature", temperature)
    if not 0 < temperature < inf:
        raise ValueError(f"{op}: temperature is {temperature}, but it must be a finite number above 0.")
    positions = (student.shape[0], *student.shape[2:])
    if reduction == "mean" and prod(positions) == 0:
        raise ValueError(
            f"{op}: student {checks.describe(student)} has no positions, so it has no mean: use reduction='sum' or 'none'."
        )
    student, teacher, codebook = checks.for_distance(student, teacher, codebook)
    run = dispatch.implementation(op, (student, teacher, codebook), backend)
    loss: Tensor = run(student, teacher, codebook, float(temperature))  # (M,)
    return reduced(loss.reshape(positions), reduction).to(student.dtype)


def _check_shapes(op: str, student: Tensor, teacher: Tensor, codebook: Tensor) -> None:
    fits = 2 <= student.ndim <= 5 and teacher.shape == student.shape and codebook.ndim == 2
    if not fits or codebook.shape[1] != student.shape[1]:
        raise ValueError(
            f"{op}: student {checks.describe(student)}, teacher {checks.describe(teacher)}, codebook {checks.describe(codebook)}, "
            "but they must be (B, D, *S) with one to three spatial axes or (M, D), the same, and (K, D)."
        )
    if 0 in codebook.shape:
        raise ValueError(
            f"{op}: codebook {checks.describe(codebook)}, but there must be at least one code and one channel."
        )


spec.register(codebook_cross_entropy)
