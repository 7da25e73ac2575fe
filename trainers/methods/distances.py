"""What several methods measure between feature maps, each with one kernel of kdops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kdops
from trainers.methods.base import Features


def mean_over_taps(term: Callable[[Tensor, Tensor], Tensor], student: Features, teacher: Features) -> Tensor:
    """(1/J) sum_j term(student_j, teacher_j); a mean, so that weights do not depend on the number of taps (methods.md 8)."""
    return torch.stack([term(student[name], teacher[name]) for name in teacher]).mean()


def mean_difference(x: Tensor, y: Tensor, p: int = 1) -> Tensor:
    """mean |x - y|^p of maps (B, ...): one pass over both, and none of their size in between."""
    return kdops.matched_distance(x, y.unsqueeze(1), p=p).mean()
