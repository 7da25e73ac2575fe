"""RKD: relational knowledge distillation (Park et al., CVPR 2019): imitate distances and angles between the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss

import kdops
from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements
from trainers.methods.distances import mean_over_taps

EPS = 1e-12


class RKDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""
    distance: Weight = 0.01
    """Weight of the loss over pairs, a mean over the taps."""
    angle: Weight = 0.02
    """Weight of the loss over triplets, a mean over the taps."""


class RKDOptions(MethodOptions):
    """RKD: the relations between the samples of a batch in feature space, beside output distillation."""

    needs_teacher: ClassVar[bool] = True
    smallest_batch: ClassVar[int] = 3  # an angle needs three samples

    name: Literal["rkd"]
    """The method."""
    weights: RKDWeights = RKDWeights()
    """Weights of the losses."""
    vectors: Literal["pooled", "flat"] = "pooled"
    """A sample's vector (our reading): the mean of its tap over the positions, or the whole map."""

    @property
    def indivisible(self) -> str | None:
        return "its losses relate the student's features of all samples of the batch to each other, with gradients"


class RKD(Method):
    """L = L1(s, y) + L1(s, t) + w_d L_distance + w_a L_angle (methods.md 6.6).

    x_i is a sample's vector at a tap, D_ij = ||x_i - x_j||_2.

    - distance: smooth_l1( D^S / mean of D^S > 0, D^T / mean of D^T > 0 ), a mean over the B^2 pairs.
    - angle: smooth_l1 of the cosines between x_i - x_j and x_k - x_j, a mean over the B^3 triplets. A cosine follows from
      squared distances alone, (D_ij^2 + D_kj^2 - D_ik^2) / (2 D_ij D_kj), so nothing of size B x B x features is built.

    Ratio 1 : 2 of the weights as in the authors' example. Vectors of restoration networks, a mean over taps, and the size of the
    weights are our reading. Distances do not depend on the scale of the features, so there are no adapters.
    """

    losses = ("pixel", "output", "distance", "angle")

    def __init__(self, options: RKDOptions) -> None:
        super().__init__()
        self.pooled = options.vectors == "pooled"

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True, adapters=False)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, teacher_taps = teachers["teacher"](batch.lq)
        squared_student = {name: self.squared_distances(tap) for name, tap in student_taps.items()}
        squared_teacher = {name: self.squared_distances(tap) for name, tap in teacher_taps.items()}
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            "distance": mean_over_taps(
                lambda s, t: smooth_l1_loss(relative_distances(s), relative_distances(t)),
                squared_student,
                squared_teacher,
            ),
            "angle": mean_over_taps(
                lambda s, t: smooth_l1_loss(cosines(s), cosines(t)), squared_student, squared_teacher
            ),
        }

    def squared_distances(self, tap: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, B): D_ij^2, in units of the mean square of the vectors, which no loss depends on."""
        vectors = tap.mean(dim=(2, 3)) if self.pooled else tap.flatten(1)
        return kdops.pairwise_distance(vectors, vectors, p=2)


def relative_distances(squared: Tensor) -> Tensor:
    """(B, B): D / mean of the D above 0. The root has no gradient at 0, where samples coincide (the diagonal)."""
    apart = squared > 0
    distance = squared.where(apart, 1).sqrt().where(apart, 0)
    return distance / (distance.sum() / apart.sum().clamp(min=1)).clamp(min=EPS)


def cosines(squared: Tensor) -> Tensor:
    """(B, B, B): the cosine at j of the angle between i and k; 0 where i or k coincides with j."""
    apart = squared > 0
    distance = squared.where(apart, 1).sqrt()
    product = distance[:, :, None] * distance[None, :, :]  # D_ij D_jk
    cosine = (squared[:, :, None] + squared[None, :, :] - squared[:, None, :]) / (2 * product)
    return cosine.where(apart[:, :, None] & apart[None, :, :], 0)
