"""Natural-scene statistics: locally normalised images, BRISQUE's features and PIQE, and the maps that losses are made of."""

from __future__ import annotations

import math
from math import prod

from torch import Tensor

from .. import checks, dispatch
from . import spec
from .blocks import block_variance, edge_deviations
from .brisque import paired_products

__all__ = ["block_variance", "brisque_features", "edge_deviations", "mscn", "paired_products", "piqe"]

MOST_TAPS = 31
NARROWEST = 1e-3  # pixels: all weights but the middle one are 0, as of any smaller sigma, whose square would be 0


def mscn(
    image: Tensor,
    *,
    window: int = 7,
    sigma: float = 7 / 6,
    c: float = 1.0,
    padding: str = "zeros",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Mean-subtracted, contrast-normalised image: every pixel in units of its neighbourhood.

    mean = g * image, local_std = sqrt(g * image^2 - mean^2 + 1e-8), normalised = (image - mean) / (local_std + c)

    g is a Gaussian of window x window pixels whose weights sum to 1. The variance is formed without its difference of large numbers:
    it is never negative, and as exact on an image around 255 as on one around 0. Where the image is constant, normalised is exactly 0,
    local_std 1e-4, and the gradient finite. Time O(B C H W window), memory: the image and both results are kept for backward (only the
    image if it has 16 bits: backward then runs forward again, in float32).

    Args:
        image: (B, C, H, W), float32, bfloat16 or float16 (float64 on the CPU and reference backends), any strides; channels are
            independent. c is in its unit: 1 suits values in 0..255.
        window: odd, 1 to 31 pixels.
        sigma: of the Gaussian, in pixels.
        c: added to the standard deviation, at least 0.
        padding: beyond the border there are "zeros", or the border pixels again ("replicate").
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        normalised and local_std, each (B, C, H, W), contiguous, in the dtype of the image (float32 under autocast).

    Raises:
        TypeError: not a floating-point tensor, or a window, sigma or c that is no number.
        ValueError: an image of other axes or without pixels, an even or too large window, a sigma that is not positive, a negative c,
            an unknown padding or backend.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the coefficients of BRISQUE (Mittal, Moorthy and Bovik, IEEE TIP 21(12), 2012, equations 1-3; methods.md 5.1), whose local
    deviation has no 1e-8.
    """
    op = "mscn"
    checks.tensors(op, image=image)
    checks.choice(op, "padding", padding, ("zeros", "replicate"))
    if image.ndim != 4 or prod(image.shape[1:]) == 0:
        raise ValueError(
            f"{op}: images are {checks.describe(image)}, but they must be (B, C, H, W) of at least one channel and pixel."
        )
    window = checks.whole(op, "window", window)
    sigma, c = checks.number(op, "sigma", sigma), checks.number(op, "c", c)
    if not (1 <= window <= MOST_TAPS and window % 2 == 1):
        raise ValueError(f"{op}: window is {window}, but it must be an odd number from 1 to {MOST_TAPS}.")
    if not (0 < sigma < math.inf and 0 <= c < math.inf):
        raise ValueError(f"{op}: sigma is {sigma} and c {c}, but they must be positive, or 0 for c, and finite.")
    (image,) = checks.for_distance(image)
    result: tuple[Tensor, Tensor] = dispatch.implementation(op, (image,), backend)(
        image, window, max(sigma, NARROWEST), c, padding == "replicate"
    )
    return result


def brisque_features(image: Tensor, *, backend: str = "auto") -> Tensor:
    r"""The 36 numbers that BRISQUE judges an image by: how far its local statistics are from those of natural scenes.

    For the image and its half (antialiased bicubic), of x = mscn(image)[0]: shape and variance of a generalised Gaussian that fits x,
    then for the products of x with its neighbours to the right, below and on both diagonals (borders wrap around) shape, mean, left
    and right variance of an asymmetric one.

    Shapes are looked up in steps of 0.001 from 0.2 to 10 and have no gradient, as published; variances have one, and means have that of
    their difference of deviations. Where there is nothing to fit (an image of zeros: a constant one has borders, beyond which there are
    zeros) the shape is 10 and the rest 0, with gradients of 0. Moments are taken in float64, in plain torch. Time O(B H W), memory
    O(B H W).

    Args:
        image: (B, 1, H, W), luma in 0..255 (Y of YIQ: 0.299 R + 0.587 G + 0.114 B), float32, bfloat16 or float16 (float64 on the CPU and
            reference backends), any strides. It is not rounded here, so that it has a gradient: published scores take whole numbers.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, 36), 18 for each scale, in the dtype of the image (float32 under autocast).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as mscn; ValueError also for more than one channel.

    Source: BRISQUE (IEEE TIP 21(12), 2012, equations 1-13) in the reading of methods.md 5.1. Published codes differ where H or W is odd:
    here the half has ceil(H / 2) x ceil(W / 2) pixels, as MATLAB's imresize.
    """
    op = "brisque_features"
    _check_luma(op, image)
    (image,) = checks.for_distance(image)
    features: Tensor = dispatch.implementation(op, (image,), backend)(image)
    return features


def piqe(image: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Perception-based quality of an image without a reference: 0 (good) to 100, and the blocks that are to blame.

    The image, scaled to a maximum of 255 and rounded, is normalised (mscn with replicate padding) and cut into blocks of 16 x 16. With v
    the unbiased variance of a block and s = sqrt(v), a block is active if v > 0.1. An active block has an artifact if one of the 44
    segments of 6 pixels of its four borders has a standard deviation below 0.1, and noise if s > 2 |s - q| / max(s, q), where q is the
    standard deviation of its two middle columns over that of the other 14.

    score = 100 (sum over active blocks of (artifact (1 - v) + noise v) + 1) / (number of active blocks + 1)

    No gradient: the image is rounded and blocks are counted. A loss can match `kdops.nss.block_variance` and `edge_deviations` of the
    normalised image, which have one.

    Args:
        image: (B, 1, H, W), grey, of any positive scale, float32, bfloat16 or float16 (float64 on the CPU and reference backends), any
            strides. Sizes that are not multiples of 16 are completed below and to the right by the mirror image.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        score (B,) in the dtype of the image (float32 under autocast); the masks artifact, noise and activity, (B, ceil(H / 16),
        ceil(W / 16)) bool, the first two within the third.

    Raises:
        TypeError, ValueError, RuntimeError: as mscn; ValueError also for more than one channel.
        NotImplementedError: forward mode or torch.func on a kernel backend.

    Source: PIQE (Venkatanath et al., NCC 2015) in the reading of methods.md 5.2. Two slips of a known port are not repeated: the surround
    of the middle columns 7 and 8 (from 0) is all other columns (the port drops 7 and 9 from it), and the image is completed to the
    next multiple of 16 (the port adds the remainder, and then loses a part of the image).
    """
    op = "piqe"
    _check_luma(op, image)
    (image,) = checks.for_distance(image)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.implementation(op, (image,), backend)(image)
    return result


def _check_luma(op: str, image: Tensor) -> None:
    checks.tensors(op, image=image)
    if image.ndim != 4 or image.shape[1] != 1 or prod(image.shape[2:]) == 0:
        raise ValueError(
            f"{op}: images are {checks.describe(image)}, but they must be (B, 1, H, W) of at least one pixel: "
            "take the luma of a colour image first."
        )


for _function in (mscn, brisque_features, piqe):
    spec.register(_function)
