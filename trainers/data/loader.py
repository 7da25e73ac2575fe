"""Batches of consecutive steps, made ahead of time by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainers.data.sets import TrainSet
from trainers.errors import InputError

STEPS_AHEAD = 4  # batches that each worker holds ready


class Steps(Dataset[tuple[int, Tensor, Tensor] | InputError]):
    """`steps[step]` is (step, lq, gt), the given rows of that step's effective batch."""

    def __init__(self, train_set: TrainSet, seed: int, rows: Sequence[int]) -> None:
        self.train_set = train_set
        self.seed = seed
        self.rows = rows

    def __getitem__(self, step: int) -> tuple[int, Tensor, Tensor] | InputError:
        try:
            return step, *self.train_set.samples(self.seed, step, self.rows)
        except InputError as error:  # returned: raised in a worker, it would arrive as a traceback without its problems
            return error


def batches(
    train_set: TrainSet, *, seed: int, start_step: int, stop_step: int, rows: Sequence[int], workers: int = 0
) -> Generator[tuple[int, Tensor, Tensor]]:
    """(step, lq, gt) for the steps from `start_step` up to but not including `stop_step`.

    lq (n, C, patch / scale, patch / scale) and gt (n, C, patch, patch) are the samples `rows` of the step's effective batch,
    float32 in [0, 1] (in pinned memory where there is a GPU). They do not depend on the number of workers; 0 makes them
    in this process; they end with the generator: close it. torch's global generator is not touched.
    InputError when an image turns out to be unreadable.
    """
    loader = DataLoader(
        Steps(train_set, seed, rows),
        batch_size=None,
        sampler=range(start_step, stop_step),
        num_workers=workers,
        prefetch_factor=STEPS_AHEAD if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # else the loader draws its workers' seeds from the global one
    )
    loaded: Any = iter(loader)
    try:
        for made in loaded:
            if isinstance(made, InputError):
                raise made
            yield made
    finally:
        if workers:
            # Not left to the garbage collector: torch raises, from the signal that a child has died, wherever this process is, and
            # what is raised in a __del__ is printed with its traceback. While they are told to end, a dead one is no loss.
            with suppress(RuntimeError):
                loaded._shutdown_workers()


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, reaches the whole process group: the parent decides, workers go on until told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
