"""The exponential moving average of the student's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """average <- d average + (1 - d) weights after each step, in float32, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets the average forget the initialisation. Buffers are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._pairs = list(zip(self.network.parameters(), network.parameters(), strict=True))
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if self._buffers:
            averages, current = zip(*self._buffers, strict=True)
            torch._foreach_copy_(averages, current)
