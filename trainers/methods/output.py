"""Output distillation (logits KD): the student also imitates the teacher's restored image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements


class OutputWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""


class OutputOptions(MethodOptions):
    """Output distillation: L1 to the ground truth and L1 to the teacher's output."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["output"]
    """The method."""
    weights: OutputWeights = OutputWeights()
    """Weights of the losses."""


class Output(Method):
    """Logits KD (methods.md 6.1): pixel = ||S(x) - y||_1 and output = ||S(x) - T(x)||_1, both with weight 1 as in DUKD's code."""

    losses = ("pixel", "output")

    def __init__(self, options: OutputOptions) -> None:
        super().__init__()

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",))

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, _ = student(batch.lq)
        imitated, _ = teachers["teacher"](batch.lq)
        return {"pixel": l1_loss(restored, batch.gt), "output": l1_loss(restored, imitated)}
