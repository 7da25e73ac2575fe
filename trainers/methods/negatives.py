"""DCKD's degradations: what makes a negative worse than the student's own result."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from trainers.fields import Section
from trainers.randomness import real_numbers

KERNEL_SIDES = (3, 5, 7, 9, 11)
BLUR_SIGMA, NOISE_SIGMA = (0.1, 2.0), (1 / 255, 30 / 255)
UP_PROBABILITY, UP_SCALE, DOWN_SCALE = 0.25, (1.0, 1.5), (0.5, 1.0)
RESIZE_MODES = ("area", "bilinear", "bicubic")


class Negatives(Section):
    """Degradations of a negative's input, one after the other, each with a probability. The defaults are DCKD's for super-resolution."""

    count: int = Field(default=4, ge=1)
    """Degraded negatives of each sample, besides the undegraded one."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of a Gaussian blur: sides of 3 to 11 pixels, deviations of 0.1 to 2 pixels, along each axis by itself."""
    resize: float = Field(default=0.0, ge=0, le=1)
    """Probability of a resize and back: up to 1.5 times with probability 0.25, else down to half."""
    noise: float = Field(default=1.0, ge=0, le=1)
    """Probability of Gaussian noise of a deviation of 1 to 30 in 255."""
    grey: float = Field(default=0.5, ge=0, le=1)
    """Probability that the noise is the same in all colours."""

    def problem(self) -> str | None:
        """Why some negatives may be the sample itself, which makes the contrast's ratio explode (2e6 measured, methods.md 8)."""
        if max(self.blur, self.resize, self.noise) == 1:
            return None
        return "may leave negatives undegraded, and its ratio then explodes: set blur, resize or noise to 1"


class Dice:
    """Random choices of one sample."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def happens(self, probability: float) -> bool:
        return self.between(0, 1) < probability

    def between(self, least: float, most: float) -> float:
        with real_numbers():
            return least + (most - least) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def index(self, count: int) -> int:
        with real_numbers():
            return int(torch.randint(count, (), generator=self.generator))


def degrade(image: Tensor, options: Negatives, generator: torch.Generator) -> Tensor:
    """A degraded copy of an image (3, h, w) in [0, 1], in the order blur, resize, noise (methods.md 3a)."""
    dice, made = Dice(generator), image[None]
    if dice.happens(options.blur):
        made = blurred(made, dice)
    if dice.happens(options.resize):
        made = resized(made, dice)
    if dice.happens(options.noise):
        made = noisy(made, dice, options.grey)
    return made[0]


def blurred(image: Tensor, dice: Dice) -> Tensor:
    for axis in (2, 3):
        side, sigma = KERNEL_SIDES[dice.index(len(KERNEL_SIDES))], dice.between(*BLUR_SIGMA)
        offsets = torch.arange(side, dtype=image.dtype, device=image.device) - side // 2
        kernel = (-(offsets**2) / (2 * sigma**2)).exp()
        shape = [1, 1, 1, 1]
        shape[axis] = side
        weight = (kernel / kernel.sum()).view(shape).expand(image.shape[1], 1, *shape[2:])
        margin = (0, 0, side // 2, side // 2) if axis == 2 else (side // 2, side // 2, 0, 0)
        image = conv2d(pad(image, margin, mode="replicate"), weight, groups=image.shape[1])
    return image


def resized(image: Tensor, dice: Dice) -> Tensor:
    scale = dice.between(*UP_SCALE) if dice.happens(UP_PROBABILITY) else dice.between(*DOWN_SCALE)
    size = [max(1, round(side * scale)) for side in image.shape[2:]]
    for target in (size, list(image.shape[2:])):
        image = interpolate(image, target, mode=RESIZE_MODES[dice.index(len(RESIZE_MODES))])
    return image


def noisy(image: Tensor, dice: Dice, grey: float) -> Tensor:
    """Clipped to [0, 1]."""
    sigma, colours = dice.between(*NOISE_SIGMA), 1 if dice.happens(grey) else image.shape[1]
    noise = torch.randn(1, colours, *image.shape[2:], generator=dice.generator)
    return (image + sigma * noise.to(image)).clamp(0, 1)
