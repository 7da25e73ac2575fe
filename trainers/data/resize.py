"""MATLAB's `imresize(image, scale)` with its default bicubic kernel: the degradation that published SR numbers rest on.

What MATLAB does, and so does this (each point changes the result):
- The kernel is Keys' cubic convolution with a = -0.5 (Keys, IEEE Trans. ASSP 29(6), 1981, equation 15).
- When shrinking, the kernel is stretched by 1/scale and lowered by scale (antialiasing).
- Pixel centres are aligned: output pixel i looks at input position (i + 0.5) / scale - 0.5.
- The two axes are resized one after the other, rows first; on uint8 images the result is rounded after each axis.
- Beyond the border the image is mirrored, the edge pixel repeated (`symmetric`).
- The output has ceil(scale * size) pixels along each axis.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from trainers.data.images import PEAKS
from trainers.randomness import real_numbers

Border = Literal["symmetric", "replicate"]


def imresize(image: Tensor, scale: float, *, border: Border = "symmetric", uint8: bool = False) -> Tensor:
    """Bicubic resize as MATLAB's imresize.

    image   (..., H, W), uint8, uint16 or floating; any range of values if floating
    scale   factor on both axes, > 0; antialiased below 1
    border  "symmetric" as in MATLAB, or "replicate" (the edge pixel goes on), with which Set14's and B100's LR were made
    uint8   round and clip to whole pixel values after each axis, as MATLAB does on uint8 images. A floating image is then
            read as [0, 1] and first rounded to multiples of 1/255. Implied by a uint8 image; uint16 images
            are rounded to their own whole values.

    Returns (..., ceil(scale * H), ceil(scale * W)) in the image's dtype. Floating results are neither rounded nor clipped:
    bicubic overshoots. The sums are taken in float64, tap by tap, so the bits are the same on every machine.
    Raises TypeError for other dtypes, ValueError for a scale that is not positive or an image without pixels.
    Source: MATLAB documentation of imresize; bit-equal to the LR images that ship with Set5, Set14 and B100
    (tests/trainers/test_resize.py; Set5's x8 was made without rounding in between).
    """
    if image.dtype not in PEAKS and not image.is_floating_point():
        raise TypeError(f"imresize takes a uint8, uint16 or floating image, got {image.dtype}; convert it first")
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"imresize takes an image (..., H, W) with at least one pixel, got shape {tuple(image.shape)}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if border not in ("symmetric", "replicate"):
        raise ValueError(f"border must be 'symmetric' or 'replicate', got {border!r}")

    pixels = (image.cpu() if image.device.type == "mps" else image).double()  # Apple GPUs have no float64
    if image.dtype in PEAKS:
        resized = resize_both_axes(pixels, scale, border, PEAKS[image.dtype])
    elif uint8:
        resized = resize_both_axes(rounded(pixels * 255, 255), scale, border, 255) / 255
    else:
        resized = resize_both_axes(pixels, scale, border, None)
    return resized.to(image)  # its dtype and device


def resize_both_axes(pixels: Tensor, scale: float, border: Border, peak: int | None) -> Tensor:
    """Rows, then columns, each time along axis -2, where gathering is fast. Rounded to 0..peak after each, if there is one."""
    for _ in ("rows", "columns"):
        pixels = resize_rows(pixels, scale, border)
        pixels = pixels if peak is None else rounded(pixels, peak)
        pixels = pixels.transpose(-1, -2).contiguous()
    return pixels


def resize_rows(pixels: Tensor, scale: float, border: Border) -> Tensor:
    """(..., H, W) -> (..., H', W): row i is the sum over taps p of weight[i, p] * pixels[..., index[i, p], :]."""
    index, weight = contributions(pixels.shape[-2], scale, border)
    index, weight = index.to(pixels.device), weight.to(pixels.device)
    shape = (*pixels.shape[:-2], index.shape[0], pixels.shape[-1])
    result = pixels.new_zeros(shape)
    for tap in range(index.shape[1]):
        result = result + pixels.index_select(-2, index[:, tap]) * weight[:, tap, None]
    return result


def rounded(pixels: Tensor, peak: int) -> Tensor:
    """MATLAB's conversion to uint8 or uint16: clipped, halves rounded up."""
    return (pixels.clamp(0, peak) + 0.5).floor()


@lru_cache(maxsize=256)
@real_numbers()  # a cached fake tensor would break every later call
@torch.inference_mode(False)  # so would a cached inference tensor a call that needs gradients
def contributions(size: int, scale: float, border: Border) -> tuple[Tensor, Tensor]:
    """Which of `size` input pixels make each output pixel, and with what weight: index int64, weight float64, (size', taps).

    Weights of a row sum to 1.
    """
    stretch = max(1.0, 1.0 / scale)  # the kernel covers 4 * stretch input pixels
    new_size = math.ceil(scale * size - 1e-9)  # 7 / 49 * 49 is 7.000000000000001: still 7 pixels
    centre = (torch.arange(new_size, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = math.ceil(4 * stretch) + 2
    index = torch.floor(centre - 2 * stretch).long()[:, None] + torch.arange(
        taps
    )  # (size', taps), beyond the border too
    weight = cubic((centre[:, None] - index) / stretch)
    weight = weight / weight.sum(dim=1, keepdim=True)
    if border == "symmetric":
        period = index.remainder(2 * size)
        index = torch.minimum(period, 2 * size - 1 - period)
    else:
        index = index.clamp(0, size - 1)
    used = (weight != 0).any(dim=0)
    return index[:, used], weight[:, used]


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -0.5; support (-2, 2)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
