"""Where a run stands, which its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Training time, without validation and saving."""
    best: dict[str, float] | None = None
    """{"step", "psnr"} of the best validation on the first set."""


@dataclass
class Window:
    """What has gathered since the last line of metrics.jsonl."""

    losses: list[Tensor] = field(default_factory=list)
    """(terms,) per step, on the device."""
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds spent waiting for data."""
