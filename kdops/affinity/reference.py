"""The definition of the affinity distance, in eager torch: oracle of the tests and portable fallback.

It holds N x N matrices, which is what the kernels exist to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_distance(student: Tensor, teacher: Tensor, p: int, eps: float) -> Tensor:
    """student (B, Cs, *S), teacher (B, Ct, *S) -> (B,): sum over all pairs of positions of |affinity_s - affinity_t|^p."""
    s, t = normalised(student, eps), normalised(teacher, eps)
    difference = s.mT @ s - t.mT @ t  # (B, N, N)
    terms = difference.abs() if p == 1 else difference.square()
    return terms.flatten(1).sum(dim=1)


def normalised(maps: Tensor, eps: float) -> Tensor:
    """(B, C, *S) -> (B, C, N): columns divided by their norm + eps, in float32 or float64."""
    columns = (maps if maps.dtype == torch.float64 else maps.float()).flatten(2)
    return columns / (norms(columns) + eps)


def norms(columns: Tensor) -> Tensor:
    """(B, C, N) -> (B, 1, N), of columns divided by their largest value, so that squares neither overflow nor underflow."""
    largest = columns.detach().abs().amax(dim=1, keepdim=True)
    largest = largest.where(largest > 0, 1)
    norm: Tensor = largest * torch.linalg.vector_norm(columns / largest, dim=1, keepdim=True)
    return norm
