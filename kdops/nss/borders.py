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
    near, far = ([_cubic((k + 0.5) / 2) for k in range(i, i + 2)] for i in (0, 2))
    weights = [w / (2 * sum(near + far)) for w in (*far[::-1], *near[::-1], *near, *far)]
    for axis in (-2, -1):  # the last pixel matters if the size is odd
        first, *others = mirrored(image, axis, 3, 4).unfold(axis, 8, 2).unbind(dim=-1)
        image = weights[0] * first
        for weight, tap in zip(weights[1:], others, strict=True):
            image = torch.add(
                image, tap, alpha=weight
            )  # a tensor of weights would be copied from the host, which waits
    return image


def _cubic(x: float) -> float:
    return (1.5 * x - 2.5) * x * x + 1 if x <= 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2
