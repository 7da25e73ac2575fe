"""FACD: feature-domain adaptive contrastive distillation (Moon et al., IEEE Access 2023, arXiv 2211.15951)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import l1_loss, normalize

import kdops
from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements

EPS = 1e-7


class FACDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 0.5
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 0.5
    """Weight of the L1 distance between student and teacher."""
    contrast: Weight = 0.015
    """Weight of the contrastive loss, a mean over the taps (0.015 for the ratio, 0.06 for InfoNCE)."""


class FACDOptions(MethodOptions):
    """FACD: contrast in the teacher's feature space, on the patches where the teacher beats the student."""

    needs_teacher: ClassVar[bool] = True
    # The negatives are other patches of the batch: with one patch there is none, and the ratio would be d / 1e-7.
    smallest_batch: ClassVar[int] = 2

    name: Literal["facd"]
    """The method."""
    weights: FACDWeights = FACDWeights()
    """Weights of the losses."""
    form: Literal["ratio", "infonce"] = "ratio"
    """Contrastive loss: the ratio of the distances to positive and negatives, or InfoNCE over them."""
    distance: Literal["l1", "l2", "cosine"] = "l1"
    """Distance between features: mean absolute or mean squared difference, or one minus the cosine (l1 is our reading)."""
    negatives: int | None = Field(default=None, ge=1)
    """Patches of the batch that are a patch's negatives, drawn in each step; null takes all others (our reading)."""
    adaptive: bool = True
    """Distil only the patches where the teacher is nearer to the ground truth than the student."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of InfoNCE, in units of the distance."""


class FACD(Method):
    r"""L = L_SR + w L_FACD (methods.md 4a). The paper shows a figure of the framework; the equations are our reading.

    i is a patch of the batch, j one of three taps along the body (the third before the global skip: figure), F^S a student
    tap behind its block DR (figure; our reading: a 1x1 convolution trained jointly and dropped at test time), F^T the
    teacher's tap itself (figure). d(u, v) is the mean of |u - v| (our reading; `distance: l2` squares).

    - pixel, output: L_SR between SR^S and both GT and SR^T (figure); 0.5 and 0.5 as in FAKD (our reading).
    - contrast: (1/B) sum_i m_i (1/3) sum_j d(F_ij^S, F_ij^T) / (1/(B-1) sum_{k != i} d(F_ij^S, F_kj^T) + 1e-7)
      The negatives are the teacher's features of the other patches at the same tap (figure: index k; that they are
      the teacher's, and that all B-1 are taken, is our reading; `negatives: K` draws K).
      `form: infonce` is the mutual-information reading of the paper's first version:
      -log( e^{-d_pos/t} / (e^{-d_pos/t} + sum_k e^{-d_neg,k/t}) ).
    - m_i = 1 where ||SR_i^T - GT_i||_1 < ||SR_i^S - GT_i||_1, else 0: the "adaptive distillation" of the abstract
      (its condition is our reading).

    Taps are divided by the RMS of the teacher's tap and the adapters start from a least-squares fit (methods.md 8).
    """

    losses = ("pixel", "output", "contrast")

    def __init__(self, options: FACDOptions) -> None:
        super().__init__()
        self.form = options.form
        self.p = 1 if options.distance == "l1" else 2
        self.cosine = options.distance == "cosine"
        self.negatives = options.negatives
        self.adaptive = options.adaptive
        self.temperature = options.temperature

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True, batch_coupled=True)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        teacher_outputs, teacher_taps = batch.shared["teacher"]  # of the whole effective batch
        imitated = teacher_outputs[batch.rows]
        others = self.others(batch, len(teacher_outputs)).to(restored.device)
        contrast = torch.stack(
            [
                self.contrast(student_taps[name], features[batch.rows], features, others)
                for name, features in teacher_taps.items()
            ]
        ).mean(dim=0)  # (m,): mean over taps j
        if self.adaptive:
            contrast = contrast * teacher_is_better(restored.detach(), imitated, batch.gt)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            "contrast": contrast.mean(),
        }

    def others(self, batch: Batch, count: int) -> Tensor:
        """(m, B): which patches of the batch are negatives of which, k != i."""
        others = ~torch.eye(count, dtype=torch.bool)[batch.rows]
        if self.negatives is not None and self.negatives < count - 1:
            drawn = torch.stack([torch.rand(count, generator=generator) for generator in batch.generators("facd")])
            chosen = drawn.where(others, -1).topk(self.negatives, dim=1).indices
            others = torch.zeros_like(others).scatter(1, chosen, True)
        return others

    def contrast(self, anchor: Tensor, positive: Tensor, pool: Tensor, others: Tensor) -> Tensor:
        """The loss of one tap, per sample: anchor and positive (m, C, h, w), pool (B, C, h, w), others (m, B) -> (m,)."""
        if (
            self.cosine
        ):  # 1 - cos(u, v) is half the squared distance of unit vectors: the mean of squares times their number / 2
            half = (anchor[0].numel() / 2) ** 0.5
            anchor, positive, pool = (half * normalize(x.flatten(1), dim=1) for x in (anchor, positive, pool))
        if self.form == "ratio":
            return kdops.contrastive_ratio(anchor, positive, pool, p=self.p, eps=EPS, mask=others, reduction="none")
        # InfoNCE: log(e^{-d_pos/t} + sum_k e^{-d_neg,k/t}) + d_pos/t.
        to_positive = kdops.matched_distance(anchor, positive.unsqueeze(1), p=self.p) / self.temperature  # (m, 1)
        to_pool = kdops.pairwise_distance(anchor, pool, p=self.p) / self.temperature  # (m, B)
        to_negatives = to_pool.masked_fill(~others, float("inf"))
        return torch.cat([-to_positive, -to_negatives], dim=1).logsumexp(dim=1) + to_positive.squeeze(1)


def teacher_is_better(restored: Tensor, imitated: Tensor, gt: Tensor) -> Tensor:
    """m_i (methods.md 4a, our reading): (m,) float, 1 where the teacher's L1 error on the patch is below the student's."""
    student_error = (restored - gt).abs().mean(dim=(1, 2, 3))
    teacher_error = (imitated - gt).abs().mean(dim=(1, 2, 3))
    return (teacher_error < student_error).to(gt.dtype)
