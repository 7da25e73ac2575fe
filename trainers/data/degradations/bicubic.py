"""Bicubic downscaling, the degradation of super-resolution."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainers.data.degradations.base import Degradation
from trainers.data.resize import Border, imresize


class Bicubic(Degradation):
    """MATLAB's bicubic downscaling of the whole image, rounded to whole pixel values as a file would be."""

    name: Literal["bicubic"] = "bicubic"
    """The degradation."""
    border: Border = "symmetric"
    """Beyond the image's border: symmetric (MATLAB, Set5) or replicate (with which the inputs of Set14 and B100 were made)."""

    def prepare(self, gt: Tensor, scale: int) -> Tensor:
        return imresize(gt, 1 / scale, border=self.border)
