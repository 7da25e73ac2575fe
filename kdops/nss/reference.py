"""The definition of the locally normalised image, in eager torch: oracle of the tests and portable fallback.

It holds windows of the image, which is what the kernels exist to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-8  # inside the square root, so that a constant image has a gradient


def gaussian_window(window: int, sigma: float, like: Tensor) -> Tensor:
    """Weights of one axis, which sum to 1: (window,), of the dtype and device of `like`."""
    distance = torch.arange(window, dtype=torch.float64, device=like.device) - window // 2
    weights = (-distance.square() / (2 * sigma * sigma)).exp()
    return (weights / weights.sum()).to(like.dtype)


def mscn(image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) -> normalised, local_std of the same shape, computed in float32 or float64.

    Axis after axis, the mean relative to the centre of the window, and the mean of variances plus the variance of means:
    g * x^2 - (g * x)^2 without its difference of large numbers, and exactly 0 where the image is constant.
    """
    x = image if image.dtype == torch.float64 else image.float()
    weights = gaussian_window(window, sigma, x)
    r = window // 2
    mean = F.pad(x, (r, r, r, r), mode="replicate" if replicate else "constant")
    variance = torch.zeros_like(mean)
    for axis in (-1, -2):
        centre = mean.narrow(axis, r, x.shape[axis])
        means = mean.unfold(axis, window, 1) - centre.unsqueeze(-1)  # (..., window)
        offset = (means * weights).sum(dim=-1)
        variances = variance.unfold(axis, window, 1) + (means - offset.unsqueeze(-1)).square()
        mean, variance = centre + offset, (variances * weights).sum(dim=-1)
    std = (variance + TINY).sqrt()
    normalised = (x - mean) / (std + c)
    return normalised.to(image.dtype).contiguous(), std.to(image.dtype).contiguous()
