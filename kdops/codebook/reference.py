"""The definition of the cross-entropy over a codebook, in eager torch: oracle of the tests and portable fallback.

It holds several (M, K) matrices, which is what the kernels exist to avoid.
"""

from __future__ import annotations

from torch import Tensor


def codebook_cross_entropy(student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """student, teacher (B, D, *S) or (M, D), codebook (K, D) -> (M,), M = B N: the samples' positions in order."""
    p, q = (_logits(t, codebook, temperature) for t in (student, teacher))
    return -(q.softmax(dim=1) * p.log_softmax(dim=1)).sum(dim=1)


def _logits(features: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """(M, K): -||x - e||^2 / t without its term ||x||^2 / t, which no softmax over the codes sees."""
    rows = features.flatten(2).transpose(1, 2).flatten(0, 1) if features.ndim > 2 else features  # (M, D)
    return (2 * rows @ codebook.t() - codebook.square().sum(dim=1)) / temperature
