"""What a degradation is: a section of the config that turns a ground truth into an input."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainers.fields import Section


class Degradation(Section):
    """Base of the degradations.

    `prepare` runs once for each image, and its result is cached; `degrade` runs for each sample on the patch cut from it.
    All randomness comes from the generator that `degrade` is given, which is seeded by (seed, step, sample index) in
    training and by the image's name in evaluation.
    """

    def margin(self) -> int:
        """Pixels that `degrade` needs to see around the patch; the image is mirrored beyond its border."""
        return 0

    def prepare(self, gt: Tensor, scale: int) -> Tensor:
        """Ground truth (C, H, W) -> (C, H / scale, W / scale), in the same integer dtype."""
        if scale != 1:
            raise ValueError(f"{type(self).__name__.lower()} keeps the size of an image, but the scale is {scale}")
        return gt

    def degrade(self, image: Tensor, random: np.random.Generator) -> Tensor:
        """(C, h + 2 * margin, w + 2 * margin) -> (C, h, w), float32; pixels of the ground truth are in [0, 1]."""
        return image


def as_stored(image: Tensor) -> Tensor:
    """Clipped to [0, 1] and rounded to multiples of 1/255, as an 8-bit file would hold it."""
    return (image * 255).round().clamp(0, 255) / 255
