"""How the effective batch of a step becomes micro-batches: by devices, by what fits in memory, and with what all samples share."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
import torch.distributed
from lightning_fabric import Fabric
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainers.config import Config
from trainers.errors import OutOfMemory
from trainers.footprint import step_costs
from trainers.methods import Batch, Features
from trainers.step import TrainStep

Stages = Sequence[tuple[int, Config]]


def stage_at(stages: Stages, step: int) -> tuple[int, Config]:
    """(index, config) of the stage that a step belongs to."""
    index = max(index for index, (first, _) in enumerate(stages) if first <= step)
    return index, stages[index][1]


class MicroBatches:
    """Splits the batch of a step: each of W devices takes an equal run of its rows, in `train.accumulate` micro-batches or more."""

    def __init__(self, fabric: Fabric, stages: Stages, train_step: TrainStep) -> None:
        self.fabric = fabric
        self.stages = stages
        self.train_step = train_step
        self.most: int | None = None  # samples that fit, once memory has run out

    def rows(self, step: int) -> range:
        """This device's rows of the effective batch."""
        count = stage_at(self.stages, step)[1].data.batch // self.fabric.world_size
        return range(self.fabric.global_rank * count, (self.fabric.global_rank + 1) * count)

    def size(self, step: int) -> int:
        """Samples in a micro-batch: the largest part of this device's rows that the config and memory allow."""
        rows = len(self.rows(step))
        allowed = rows // stage_at(self.stages, step)[1].train.accumulate
        if self.most is not None:
            allowed = min(allowed, self.most)
        return max(size for size in range(1, allowed + 1) if rows % size == 0)

    def shrink(self, step: int) -> None:
        """Halve the micro-batches, from this step on.

        Raises:
            OutOfMemory: they hold one sample already, or the method does not allow several.
        """
        gc.collect()
        if self.fabric.device.type == "cuda":
            torch.cuda.empty_cache()
        size = self.size(step)
        method = stage_at(self.stages, step)[1].method
        if size == 1:
            raise OutOfMemory(
                f"out of memory with a single sample: {self._largest(step)}; lower data.patch or set train.recompute=true"
            )
        if method.indivisible:
            raise OutOfMemory(
                f"out of memory, and method {method.name} takes no micro-batches: {method.indivisible}; lower data.batch"
            )
        self.most = size // 2

    def split(self, lq: Tensor, gt: Tensor, step: int) -> list[Batch]:
        """This device's inputs and ground truths -> micro-batches, on the device, with what the method shares among all."""
        _, config = stage_at(self.stages, step)
        lq, gt = self.fabric.to_device((lq, gt))
        if config.train.channels_last:
            lq, gt = (image.contiguous(memory_format=torch.channels_last) for image in (lq, gt))
        size, first = self.size(step), self.rows(step).start
        places = [slice(first + i, first + i + size) for i in range(0, len(lq), size)]
        parts = zip(lq.split(size), gt.split(size), places, strict=True)
        batches = [Batch(part, truth, place, key=(config.train.seed, step)) for part, truth, place in parts]
        if self.train_step.method.requirements().batch_coupled:
            shared = self._shared(batches, channels_last=config.train.channels_last)
            for batch in batches:
                batch.shared = shared
        return batches

    @torch.no_grad()
    def _shared(self, batches: Sequence[Batch], *, channels_last: bool) -> dict[str, tuple[Tensor, Features]]:
        """What the method shares of each sample, for the whole effective batch: this device's rows, then everybody's."""
        with self.fabric.autocast():
            found = [self.train_step.method.share(batch, self.train_step.teachers) for batch in batches]

        def gather(parts: Sequence[Tensor]) -> Tensor:
            return self._gather(parts, channels_last=channels_last)

        shared = {}
        for name, (_, features) in found[0].items():
            outputs = gather([part[name][0] for part in found])
            shared[name] = (outputs, {tap: gather([part[name][1][tap] for part in found]) for tap in features})
        return shared

    def _gather(self, parts: Sequence[Tensor], *, channels_last: bool) -> Tensor:
        """Rows of this device -> rows of all devices, in order."""
        rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.fabric.world_size == 1:
            return rows
        rows = rows.contiguous()
        everyones = [torch.empty_like(rows) for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather(everyones, rows)
        gathered = torch.cat(everyones)
        return (
            gathered.contiguous(memory_format=torch.channels_last) if channels_last and gathered.ndim == 4 else gathered
        )

    def _largest(self, step: int) -> str:
        """What takes most of a step of one sample, counted on fake tensors, which need no memory."""
        _, config = stage_at(self.stages, step)
        side = config.data.patch
        channels = 1 if config.data.grey else 3
        with FakeTensorMode(allow_non_fake_inputs=True):
            lq = torch.empty(1, channels, side // config.scale, side // config.scale, device=self.fabric.device)
            gt = torch.empty(1, channels, side, side, device=self.fabric.device)
            batch = Batch(lq, gt, slice(0, 1), key=(config.train.seed, step))
            if self.train_step.method.requirements().batch_coupled:
                batch.shared = self.train_step.method.share(batch, self.train_step.teachers)
            return step_costs(self.train_step, batch).largest()
