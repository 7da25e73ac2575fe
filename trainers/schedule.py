"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from trainers.config import Train


def learning_rate(train: Train, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to lr, then constant, in steps, or half a cosine from lr down to lr_min."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "step":
        return train.lr * train.gamma ** sum(step >= milestone for milestone in train.milestones)
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr_min + (train.lr - train.lr_min) * (1 + math.cos(math.pi * done)) / 2
