"""FitNet: the student's features imitate the teacher's (Romero et al., ICLR 2015), at several taps as in FAKD's and DUKD's comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements
from trainers.methods.distances import mean_difference, mean_over_taps


class FitNetWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""
    feature: Weight = 0.01
    """Weight of the distance between features, a mean over the taps."""


class FitNetOptions(MethodOptions):
    """FitNet: an L1 distance between the features of student and teacher beside output distillation."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["fitnet"]
    """The method."""
    weights: FitNetWeights = FitNetWeights()
    """Weights of the losses."""
    features: Literal["maps", "channel_mean"] = "maps"
    """What is compared: the adapted maps (FitNet's regressor), or their means over the channels (as DUKD's code does)."""


class FitNet(Method):
    """L = L1(s, y) + L1(s, t) + w sum_j L1(r(F_j^S), F_j^T) (methods.md 6.2).

    - pixel, output: as in logits KD (DUKD's base class adds both to its FitNet).
    - feature: (1/J) sum_j mean |r_j(F_j^S) - F_j^T|, r_j the trained 1x1 adapter. A mean over the taps in place of the sum, and the
      weight, are our reading (methods.md 8: 2.8 -> 20 times the pixel gradient at weight 1 for a squared distance).
      `features: channel_mean` averages both maps over their channels first, raw, so that widths may differ without an
      adapter (DUKD's code).
    """

    losses = ("pixel", "output", "feature")

    def __init__(self, options: FitNetOptions) -> None:
        super().__init__()
        self.of_channel_means = options.features == "channel_mean"

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True, adapters=not self.of_channel_means)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, teacher_taps = teachers["teacher"](batch.lq)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            "feature": mean_over_taps(self.feature, student_taps, teacher_taps),
        }

    def feature(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of one tap: (B, Cs, h, w), (B, Ct, h, w) -> scalar."""
        if self.of_channel_means:
            student, teacher = student.mean(dim=1), teacher.mean(dim=1)  # (B, h, w)
        return mean_difference(student, teacher)
