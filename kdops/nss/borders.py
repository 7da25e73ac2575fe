"""Images mirrored at their borders and halved, from flips and sums alone: gradients without atomics on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def mirrored(image: Tensor, axis: int, before: int, after: int) -> Tensor:
    """`image` with more pixels along `axis`, those beyond a border its mirror image, the border pixel repeated ("symmetric")."""
    size = image.shape[axis]
    left, right = min(before, size), min(after, size)
    parts = (image.narrow(axis, 0, left).flip(axis), image, image.narrow(axis, size - right, right).flip(axis))
    wider = torch.cat(parts, dim=axis)
    if left == before and right == after:
        return wider
    return mirrored(wider, axis, before - left, after - right)


def halved(image: Tensor) -> Tensor:
    """(..., H, W) -> (..., ceil(H / 2), ceil(W / 2)): MATLAB's imresize(image, 0.5), antialiased bicubic, without rounding.

    Output pixel i is a weighted mean of the input pixels 2i - 3 .. 2i + 4, by Keys' cubic kernel (a = -0.5) stretched by 2.
    """
    weights = _halving_weights(image)
    for axis in (-2, -1):  # the last pixel matters if the size is odd
        image = (mirrored(image, axis, 3, 4).unfold(axis, 8, 2) * weights).sum(dim=-1)
    return image


def _halving_weights(image: Tensor) -> Tensor:
    """(8,), made where the image is: a copy from the host would wait."""
    x = (torch.arange(8, dtype=torch.float64, device=image.device) - 3.5).abs() / 2
    weights = torch.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    return (weights / weights.sum()).to(image.dtype)
