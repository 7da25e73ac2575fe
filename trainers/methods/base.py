"""What a distillation method is: a small module that turns a batch into named, unweighted losses.

Weights, their schedules, logging, gradient accumulation, several devices and resume are written once, outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from trainers.fields import Section

Features = dict[str, Tensor]
# x -> (output, taps). The student's taps have passed their adapters, the teacher's are divided by their RMS.
Network = Callable[[Tensor], tuple[Tensor, Features]]


class MethodOptions(Section):
    """Base of every method's options. The class variables are what the config must provide for the method."""

    needs_teacher: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 1


@dataclass(frozen=True)
class Requirements:
    """What a method needs to be given."""

    teachers: tuple[str, ...] = ()
    """Names of its frozen teachers."""
    taps: bool = False
    """Features of student and teacher, with trainable 1x1 adapters behind the student's."""
    batch_coupled: bool = False
    """A sample's loss depends on the teacher's features of other samples: `Batch.shared` is filled."""


class Batch:
    """A micro-batch: m rows of the step's effective batch of B samples.

    An ordinary class and no dataclass or dict: Fabric would walk into those, and round the ground truth to bfloat16.
    """

    def __init__(
        self,
        lq: Tensor,
        gt: Tensor,
        rows: slice = slice(None),
        shared: Mapping[str, tuple[Tensor, Features]] | None = None,
    ) -> None:
        """
        Args:
            lq: (m, 3, h, w) degraded input in [0, 1].
            gt: (m, 3, H, W) ground truth in [0, 1].
            rows: where these m samples stand in the effective batch.
            shared: output and taps of each teacher for all B samples, for batch-coupled methods: whatever the split
                into micro-batches and devices, a sample meets the same others.
        """
        self.lq = lq
        self.gt = gt
        self.rows = rows
        self.shared = shared or {}


class Method(nn.Module):
    """Base of the methods. A loss is a mean over samples, so that the mean over micro-batches is the whole batch's loss.

    The first loss is called `pixel`; the shares of the others are measured against it.
    """

    losses: ClassVar[tuple[str, ...]]

    def requirements(self) -> Requirements:
        return Requirements()

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        raise NotImplementedError
