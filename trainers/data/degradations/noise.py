"""Additive white Gaussian noise, the degradation of denoising benchmarks."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from trainers.data.degradations.base import Degradation
from trainers.fields import Span, draw, within


class Noise(Degradation):
    """input = gt + sigma / 255 * N(0, 1), independent for each pixel and channel; neither clipped nor rounded.

    So are the noisy images of DnCNN, Restormer and their successors made, for training and for testing. Grey images
    (`data.grey`) have one channel, and so has their noise.
    """

    name: Literal["noise"] = "noise"
    """The degradation."""
    sigma: Annotated[Span, within(0, 255)] = 25.0
    """Standard deviation on the 0..255 scale: a number, or [least, most] from which each sample draws its own."""

    def degrade(self, image: Tensor, random: np.random.Generator) -> Tensor:
        sigma = float(draw(self.sigma, random)) / 255
        return image + sigma * torch.from_numpy(random.standard_normal(image.shape, dtype=np.float32))
