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
        self.source = network

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        # Asked for in each step: sharding puts other parameters in their places.
        torch._foreach_lerp_(list(self.network.parameters()), list(self.source.parameters()), 1 - decay)
        if buffers := list(self.network.buffers()):
            torch._foreach_copy_(buffers, list(self.source.buffers()))
