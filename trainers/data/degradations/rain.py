"""Synthetic rain: bright streaks of motion-blurred drops, added to the image."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from trainers.data.degradations.base import Degradation, as_stored
from trainers.data.degradations.splat import splat
from trainers.fields import Span, draw, most, within

ACROSS = 4  # points side by side that make up a streak's width


class Rain(Degradation):
    """input = gt + streaks, clipped and rounded to 8 bits: the additive model of Rain100H (Yang et al., CVPR 2017, equation 1).

    Our reading of its streaks: drops fall everywhere equally likely; a sample has one density and one wind direction, each
    streak a length, width and brightness of its own, a direction within a few degrees of the wind's, and is brightest in
    its middle. All channels get the same streaks. The defaults reach from a shower to the downpours of Rain100H.
    """

    name: Literal["rain"] = "rain"
    """The degradation."""
    density: Annotated[Span, within(0, 1000)] = Field(default=[1.0, 25.0])
    """Streaks per 1,000 pixels, of each sample: a number or [least, most]."""
    length: Annotated[Span, within(0, 1000)] = Field(default=[10.0, 50.0])
    """Length of a streak in pixels."""
    width: Annotated[Span, within(0, 100)] = Field(default=[0.7, 2.2])
    """Width of a streak in pixels."""
    angle: Annotated[Span, within(-180, 180)] = Field(default=[-40.0, 40.0])
    """Direction of the rain in degrees from the vertical, of each sample."""
    spread: Annotated[float, within(0, 180)] = 6.0
    """Standard deviation in degrees of the streaks' directions around that of the sample."""
    brightness: Annotated[Span, within(0, 10)] = Field(default=[0.2, 0.8])
    """What a streak adds in its middle; 1 is white on black."""

    def degrade(self, image: Tensor, random: np.random.Generator) -> Tensor:
        return as_stored(image + torch.from_numpy(self.streaks(image.shape[-2], image.shape[-1], random)))

    def streaks(self, height: int, width: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
        """The rain alone, (height, width).

        The expected value of a pixel is density / 1000 * 2/3 * length * width * brightness, at the border as in the middle.
        """
        reach = math.ceil(most(self.length) / 2) + 1  # streaks may begin outside
        area = (height + 2 * reach) * (width + 2 * reach)
        count = int(random.poisson(float(draw(self.density, random)) / 1000 * area))
        wind = draw(self.angle, random)
        y = random.uniform(-reach, height + reach, (count, 1, 1))
        x = random.uniform(-reach, width + reach, (count, 1, 1))
        length, thickness, brightness = (
            draw(span, random, (count, 1, 1)) for span in (self.length, self.width, self.brightness)
        )
        angle = np.deg2rad(wind + self.spread * random.standard_normal((count, 1, 1)))
        steps = max(1, math.ceil(most(self.length)))
        along = ((np.arange(steps) + 0.5) / steps - 0.5)[:, None]  # (steps, 1), of the length, from its middle
        across = ((np.arange(ACROSS) + 0.5) / ACROSS - 0.5) * thickness  # (count, 1, ACROSS)
        mass = brightness * (1 - (2 * along) ** 2) * length / steps * thickness / ACROSS  # (count, steps, 1)
        along = along * length
        rows = y + along * np.cos(angle) - across * np.sin(angle)  # (count, steps, ACROSS)
        columns = x + along * np.sin(angle) + across * np.cos(angle)
        return splat(rows, columns, np.broadcast_to(mass, rows.shape), height, width).astype(np.float32)
