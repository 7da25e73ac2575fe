"""AT: attention transfer (Zagoruyko & Komodakis, ICLR 2017), in the form of FAKD's comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements
from trainers.methods.distances import mean_difference, mean_over_taps

EPS = 1e-6


class ATWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""
    attention: Weight = 1.0
    """Weight of the distance between the attention maps, a mean over the taps."""


class ATOptions(MethodOptions):
    """AT: the student's energy over the positions imitates the teacher's, beside output distillation."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["at"]
    """The method."""
    weights: ATWeights = ATWeights()
    """Weights of the losses."""


class AT(Method):
    """L = L1(s, y) + L1(s, t) + w sum_j L1(A(F_j^S), A(F_j^T)) (methods.md 6.3).

    A(F) = sum_c F_c^2, divided by its L2 norm over the positions + 1e-6 (FAKD's feature_transformation.py). Channel counts may
    differ, so there are no adapters. A mean over the taps, and the weight, are our reading.
    """

    losses = ("pixel", "output", "attention")

    def __init__(self, options: ATOptions) -> None:
        super().__init__()

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True, adapters=False)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, teacher_taps = teachers["teacher"](batch.lq)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            "attention": mean_over_taps(
                lambda s, t: mean_difference(attention_map(s), attention_map(t)), student_taps, teacher_taps
            ),
        }


def attention_map(feature: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w): energy over the channels, of L2 norm 1."""
    energy = feature.square().sum(dim=1).flatten(1)
    normalized: Tensor = energy / (torch.linalg.vector_norm(energy, dim=1, keepdim=True) + EPS)
    return normalized
