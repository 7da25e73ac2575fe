"""Motion blur and Gaussian blur: every pixel becomes a weighted mean of its neighbourhood, with weights that sum to 1."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor

from trainers.data.degradations.base import Degradation, as_stored
from trainers.data.degradations.splat import splat
from trainers.fields import Span, draw, most, within

Kernel = npt.NDArray[np.float64]

POINTS_PER_PIXEL = 4  # along a path


class MotionBlur(Degradation):
    """input = gt blurred along a path, the same everywhere, rounded to 8 bits.

    Our reading of camera shake: the camera moves with constant speed along a path of random length and direction, which turns
    at random on its way. The path's centre of mass is the pixel itself, so the image does not shift.
    """

    name: Literal["motion_blur"] = "motion_blur"
    """The degradation."""
    length: Annotated[Span, within(0, 1000)] = Field(default=[5.0, 30.0])
    """Length of the path in pixels: a number or [least, most]."""
    bend: Annotated[float, within(0, 3600)] = 60.0
    """Standard deviation in degrees of the change of direction between the path's ends; 0 blurs along straight lines."""

    def margin(self) -> int:
        # No point of a path is farther from its centre of mass than half the path's length.
        return math.ceil(most(self.length) / 2) + 1

    def degrade(self, image: Tensor, random: np.random.Generator) -> Tensor:
        return as_stored(correlate(image, self.kernel(random)))

    def kernel(self, random: np.random.Generator) -> Kernel:
        """(2 * margin + 1, 2 * margin + 1), sum 1."""
        length, reach = float(draw(self.length, random)), self.margin()
        count = POINTS_PER_PIXEL * math.ceil(most(self.length)) + 1
        turns = np.deg2rad(self.bend) / math.sqrt(count) * random.standard_normal(count)
        direction = random.uniform(0, 2 * math.pi) + np.cumsum(turns)
        rows, columns = (np.cumsum(part) * length / count for part in (np.sin(direction), np.cos(direction)))
        rows, columns = (axis - axis.mean() + reach for axis in (rows, columns))
        return splat(rows, columns, np.full(count, 1 / count), 2 * reach + 1, 2 * reach + 1)


class GaussianBlur(Degradation):
    """input = gt blurred by an isotropic Gaussian (cut off at four standard deviations), rounded to 8 bits."""

    name: Literal["gaussian_blur"] = "gaussian_blur"
    """The degradation."""
    sigma: Annotated[Span, within(0, 100)] = Field(default=[0.5, 3.0])
    """Standard deviation in pixels: a number or [least, most]."""

    def margin(self) -> int:
        return math.ceil(4 * most(self.sigma))

    def degrade(self, image: Tensor, random: np.random.Generator) -> Tensor:
        kernel = gaussian(float(draw(self.sigma, random)), self.margin())
        return as_stored(correlate(correlate(image, kernel[:, None]), kernel[None, :]))


def gaussian(sigma: float, reach: int) -> Kernel:
    """(2 * reach + 1,), sum 1, 0 beyond four standard deviations; a single 1 for sigma 0."""
    distance = np.abs(np.arange(-reach, reach + 1))
    kernel: Kernel = np.exp(-0.5 * (distance / max(sigma, 1e-3)) ** 2) * (distance <= math.ceil(4 * sigma))
    kernel /= kernel.sum()
    return kernel


def correlate(image: Tensor, kernel: Kernel) -> Tensor:
    """(C, H, W) and (h, w) -> (C, H - h + 1, W - w + 1), where the kernel fits whole.

    A sum of shifted images in a fixed order, zeros left out: the same bits for any number of threads.
    """
    height, width = image.shape[-2] - kernel.shape[0] + 1, image.shape[-1] - kernel.shape[1] + 1
    result = image.new_zeros(image.shape[0], height, width)
    for row, column in np.argwhere(kernel).tolist():
        result.add_(image[:, row : row + height, column : column + width], alpha=float(kernel[row, column]))
    return result
