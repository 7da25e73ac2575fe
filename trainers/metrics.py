"""PSNR and SSIM under named protocols. A number without its protocol means nothing: conventions differ by more than a dB.

    PROTOCOLS["sr-y"].measure(restored, gt, scale=2)   ->  {"psnr": 31.2, "ssim": 0.91}

All sums are taken in float64, on the images' device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK = 255.0
WINDOW = 11  # side of SSIM's window


@dataclass(frozen=True)
class Protocol:
    """How a restored image is compared with its ground truth."""

    name: str
    """The word for it in a config: `val.protocol`."""
    text: str
    """Colour space, range, rounding and border in one sentence, to stand beside every number."""
    prepare: Callable[[Tensor, int], Tensor]
    """(image (3, H, W) in [0, 1], scale) -> what is compared, (C, H', W'), float64 in 0..255."""
    grey: bool = False
    """Whether it measures grey images (1, H, W) too."""
    border: bool = False
    """Whether `prepare` leaves out a border of `scale` pixels."""

    def least_side(self, scale: int) -> int:
        """The least side of a ground truth, which is cropped to a multiple of the scale: SSIM's window fits into what is left."""
        return math.ceil((WINDOW + 2 * scale * self.border) / scale) * scale

    def measure(self, restored: Tensor, gt: Tensor, scale: int) -> dict[str, float]:
        """PSNR in dB (inf for equal images) and SSIM of one image.

        restored, gt  RGB (3, H, W), or grey (1, H, W) where the protocol knows it; floating, [0, 1]; values of `restored`
                      outside it are clipped
        Raises ValueError for other shapes, images of different size or too small for SSIM's window, TypeError for
        integer images.
        """
        for name, image in (("restored", restored), ("gt", gt)):
            if not image.is_floating_point():
                raise TypeError(f"{name} must be floating in [0, 1], got {image.dtype}; divide by 255 first")
            if image.dim() != 3 or image.shape[0] not in ((1, 3) if self.grey else (3,)):
                known = "one grey (1, H, W) or RGB image (3, H, W)" if self.grey else "one RGB image (3, H, W)"
                raise ValueError(f"{name} must be {known}, got shape {tuple(image.shape)}")
        if restored.shape != gt.shape:
            raise ValueError(
                f"restored {tuple(restored.shape)} and gt {tuple(gt.shape)} differ in size; crop gt to match"
            )
        x, y = self.prepare(restored, scale), self.prepare(gt, scale)
        return {"psnr": psnr(x, y).item(), "ssim": ssim(x, y).item()}

    def describe(self) -> str:
        """`name: text`."""
        return f"{self.name}: {self.text}"


def sr_y(image: Tensor, scale: int) -> Tensor:
    """Rounded to 8 bits, Y of YCbCr, `scale` pixels less on each side: (1, H - 2 * scale, W - 2 * scale)."""
    return rgb_to_y(to_8_bits(image) / 255)[:, scale:-scale, scale:-scale]


def derain_y(image: Tensor, scale: int) -> Tensor:
    """Rounded to 8 bits, then Y of YCbCr, rounded again: (1, H, W)."""
    return rgb_to_y(to_8_bits(image) / 255).round()


def rgb(image: Tensor, scale: int) -> Tensor:
    """Rounded to 8 bits: (3, H, W)."""
    return to_8_bits(image)


def grey(image: Tensor, scale: int) -> Tensor:
    """Rounded to 8 bits, the mean of the channels: (1, H, W)."""
    return to_8_bits(image).mean(dim=0, keepdim=True)


def to_8_bits(image: Tensor) -> Tensor:
    """[0, 1] -> whole numbers in 0..255, clipped, as float64."""
    return (image.double() * 255).clamp(0, 255).round()


RGB_TEXT = "PSNR over all values of RGB (0-255, peak 255) clipped and rounded to 8 bits, SSIM per channel and averaged, with the border"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in [
        Protocol(
            "sr-y",
            "PSNR and SSIM on Y of YCbCr (BT.601, 16-235, peak 255; MATLAB's rgb2ycbcr, unrounded) of RGB clipped and rounded "
            "to 8 bits, without a border of scale pixels",
            sr_y,
            border=True,
        ),
        Protocol(
            "derain-y",
            "PSNR and SSIM on Y of YCbCr (BT.601, 16-235, peak 255; MATLAB's rgb2ycbcr, rounded to 8 bits) of RGB clipped and "
            "rounded to 8 bits, with the border",
            derain_y,
        ),
        *(Protocol(name, RGB_TEXT, rgb) for name in ("denoise-rgb", "deblur-rgb", "dehaze-rgb")),
        Protocol(
            "denoise-grey",
            "PSNR and SSIM on grey (of RGB the mean of the channels; 0-255, peak 255) clipped and rounded to 8 bits, with the border",
            grey,
            grey=True,
        ),
    ]
}


def rgb_to_y(image: Tensor) -> Tensor:
    """Luma of RGB in [0, 1]: (..., 3, H, W) -> (..., 1, H, W) in [16, 235], float64, not rounded.

    Y = 16 + 65.481 R + 128.553 G + 24.966 B: ITU-R BT.601 in studio range, as MATLAB's rgb2ycbcr and the SR literature.
    The full-range luma of other libraries gives a PSNR that is 20 log10(255 / 219) = 1.32 dB lower.
    """
    red, green, blue = image.double().unbind(-3)
    return (16.0 + 65.481 * red + 128.553 * green + 24.966 * blue).unsqueeze(-3)


def psnr(restored: Tensor, gt: Tensor) -> Tensor:
    """10 log10(255^2 / mean((restored - gt)^2)) over all elements, in dB; inf for equal images.

    Any equal shapes, values on a scale of 0..255. Returns a float64 scalar.
    """
    error = (restored.double() - gt.double()).square().mean()
    return 10 * torch.log10(PEAK**2 / error)


def ssim(restored: Tensor, gt: Tensor) -> Tensor:
    """Structural similarity, averaged over positions and channels (Wang et al., IEEE TIP 13(4), 2004, equation 13).

    SSIM = (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2)), with weighted means and (co)variances
    in an 11 x 11 Gaussian window of sigma 1.5 wherever it fits whole, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.

    restored, gt  (C, H, W), H and W at least 11, values on a scale of 0..255. Returns a float64 scalar.
    Raises ValueError for images smaller than the window.
    """
    if min(restored.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs at least 11 x 11 pixels (after the border is cropped), got {tuple(restored.shape[-2:])}"
        )
    x, y = restored.double(), gt.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = gaussian_means(torch.stack([x, y, x * x, y * y, x * y]))
    covariance = mean_xy - mean_x * mean_y
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity: Tensor = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return similarity.div((mean_x.square() + mean_y.square() + c1) * (variances + c2)).mean()


def gaussian_means(maps: Tensor) -> Tensor:
    """Weighted means in an 11 x 11 Gaussian window of sigma 1.5: (..., H, W) -> (..., H - 10, W - 10).

    Along one axis, then the other, as sums of shifted maps: three times as fast as torch's float64 convolution on a CPU.
    """
    weights = [math.exp(-(distance**2) / (2 * 1.5**2)) for distance in range(-5, 6)]
    for axis in (-2, -1):
        size = maps.shape[axis] - 10
        means = torch.zeros_like(maps.narrow(axis, 0, size))
        for shift, weight in enumerate(weights):
            means.add_(maps.narrow(axis, shift, size), alpha=weight / sum(weights))
        maps = means
    return maps
