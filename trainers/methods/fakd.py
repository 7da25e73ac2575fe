"""FAKD: feature-affinity-based knowledge distillation (He et al., ICIP 2020): imitate how alike positions are, not the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import l1_loss

import kdops
from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements
from trainers.methods.distances import mean_over_taps


class FAKDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 0.5
    """Weight of the L1 distance between student and ground truth: 1 - a, with FAKD's a = 0.5."""
    output: Weight = 0.5
    """Weight of the L1 distance between student and teacher: FAKD's a."""
    affinity: Weight = 0.12
    """Weight of the distance between the affinities, a mean over the taps."""


class FAKDOptions(MethodOptions):
    """FAKD: the cosine affinities between all positions of a feature map, at any size of the map."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["fakd"]
    """The method."""
    weights: FAKDWeights = FAKDWeights()
    """Weights of the losses."""
    p: Literal[1, 2] = 1
    """Distance between the affinities: 1, mean absolute (FAKD), or 2, mean squared, in O(N C^2) (our reading)."""


class FAKD(Method):
    """L = (1 - a) L1(s, y) + a L1(s, t) + w sum_j L1(M_j^S, M_j^T) (methods.md 6.4).

    M = Fhat^T Fhat over positions (N x N), Fhat = F / (||F||_2 over the channels + 1e-8). Channel counts may differ, so there are
    no adapters. The N x N matrices are never held (kdops.affinity_distance).

    FAKD's weight is 10 for the sum over three taps and pixels in [0, 255]: 30 / 255 = 0.12 of a mean over taps beside pixels in
    [0, 1], the default here. In DUKD's re-implementation the sum goes through torch.tensor([...]), which
    detaches it, so that the term trains nothing; here its gradient reaches the student (tests/trainers/test_baselines.py).
    """

    losses = ("pixel", "output", "affinity")

    def __init__(self, options: FAKDOptions) -> None:
        super().__init__()
        self.p = options.p

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True, adapters=False)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, teacher_taps = teachers["teacher"](batch.lq)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            "affinity": mean_over_taps(
                lambda s, t: kdops.affinity_distance(s, t, p=self.p).mean(), student_taps, teacher_taps
            ),
        }
