"""Training without a teacher: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.fields import Section, Weight
from trainers.methods.base import Batch, Method, MethodOptions, Network


class ScratchWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""


class ScratchOptions(MethodOptions):
    """No distillation: the student learns from the ground truth alone."""

    name: Literal["scratch"]
    """The method."""
    weights: ScratchWeights = ScratchWeights()
    """Weights of the losses."""


class Scratch(Method):
    """pixel = ||S(x) - y||_1, the mean over batch, colours and pixels."""

    losses = ("pixel",)

    def __init__(self, options: ScratchOptions) -> None:
        super().__init__()

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, _ = student(batch.lq)
        return {"pixel": l1_loss(restored, batch.gt)}
