"""What a distillation method is: a small module that turns a batch into named, unweighted losses.

Weights, their schedules, logging, gradient accumulation, several devices and resume are written once, outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainers.fields import Section
from trainers.randomness import random_words

Features = dict[str, Tensor]
# x -> (output, taps). The student's taps have passed their adapters, the teacher's are divided by their RMS.
Network = Callable[[Tensor], tuple[Tensor, Features]]


@dataclass(frozen=True)
class Run:
    """What a method may have to refuse of the run that it is put in."""

    scale: int
    """Upsampling factor; 1 where input and output have the same size."""
    patch: int
    """Side of a training patch of the ground truth."""


class MethodOptions(Section):
    """Base of every method's options. The class variables are what the config must provide for the method."""

    needs_teacher: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 1

    @property
    def indivisible(self) -> str | None:
        """Why a batch cannot be split into micro-batches or over devices; None where it can."""
        return None

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        """(key within the method's block, or an empty text for the block itself; what is wrong and what to do)."""
        return []


@dataclass(frozen=True)
class Requirements:
    """What a method needs to be given."""

    teachers: tuple[str, ...] = ()
    """Names of its frozen teachers."""
    taps: bool = False
    """Features of student and teacher at their taps."""
    tap_groups: tuple[str, ...] | None = None
    """Of which groups (`trainers.taps.tap_group`) the taps are wanted; None: of all. Several devices stall on an adapter without a loss."""
    adapters: bool = True
    """Trainable 1x1 adapters behind the student's taps, and RMS division behind the teacher's. False: taps as they are."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Files of the weights of teachers that do not have the config's."""
    batch_coupled: bool = False
    """A sample's loss depends on frozen features of other samples: `Batch.shared` is filled."""


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
        key: tuple[int, int] = (0, 0),
    ) -> None:
        """
        Args:
            lq: (m, 3, h, w) degraded input in [0, 1].
            gt: (m, 3, H, W) ground truth in [0, 1].
            rows: where these m samples stand in the effective batch.
            shared: what `Method.share` gives, for all B samples: whatever the split into micro-batches and devices, a
                sample of a batch-coupled method meets the same others.
            key: (seed, step) of the run, of which all randomness of a loss is a function.
        """
        self.lq = lq
        self.gt = gt
        self.rows = rows
        self.shared = shared or {}
        self.key = key

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A random generator per sample, which depends on (purpose, seed, step, place in the effective batch) alone."""
        first = self.rows.start or 0
        words = [random_words(purpose, *self.key, first + index)[0] for index in range(len(self.lq))]
        return [torch.Generator().manual_seed(word % 2**63) for word in words]


class Method(nn.Module):
    """Base of the methods. A loss is a mean over samples, so that the mean over micro-batches is the whole batch's loss.

    The first loss is called `pixel`; the shares of the others are measured against it.
    """

    losses: tuple[str, ...]

    def requirements(self) -> Requirements:
        return Requirements()

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        raise NotImplementedError

    def share(self, batch: Batch, teachers: Mapping[str, Network]) -> dict[str, tuple[Tensor, Features]]:
        """What the losses of other samples need of these ones: the maps (m, ...) that fill `Batch.shared`, without gradient."""
        return {name: teacher(batch.lq) for name, teacher in teachers.items()}

    def targets(self, lq: Tensor, gt: Tensor, teachers: Mapping[str, Network]) -> Features:
        """The taps that the student's adapters are made for and fitted to: by default the teacher's, of the degraded image."""
        (teacher,) = teachers.values()
        return teacher(lq)[1]

    def prepare(self, student: nn.Module) -> None:
        """Makes what depends on the student's network, once, before training or resuming."""

    def calibrate(self, samples: Iterable[tuple[Tensor, Tensor]], teachers: Mapping[str, Network]) -> None:
        """Sets what is measured on the samples (1, ...) of the first batch, once, before step 0; without gradient."""

    def after_step(self, step: int, average: Callable[[], nn.Module]) -> None:
        """Called after the `step`-th optimiser step (from 1) with what gives the moving average of the student."""
