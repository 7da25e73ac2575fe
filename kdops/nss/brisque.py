"""BRISQUE's features: moments of the locally normalised image and of its products with its neighbours, and the distributions they fit.

Moments are taken in float64, row by row: the same bits for any number of threads, and no shape parameter that rounding has moved by a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .borders import halved

SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # horizontal, vertical and the two diagonals, over (H, W)
NOTHING = 1e-300  # beside moments that may be 0

Mscn = Callable[[Tensor, int, float, float, bool], tuple[Tensor, Tensor]]


def features(image: Tensor, mscn: Mscn) -> Tensor:
    """image (B, 1, H, W) -> (B, 36), in float32 or float64."""
    wide = image if image.dtype == torch.float64 else image.float()
    scales = [_of_one_scale(mscn(scale, 7, 7 / 6, 1.0, False)[0]) for scale in (wide, halved(wide))]
    return torch.cat(scales, dim=1).to(image.dtype)


def paired_products(normalised: Tensor) -> Tensor:
    """Products of every pixel with its neighbours in four directions: (B, C, H, W) -> (B, 4 C, H, W), differentiable.

    P_s = x * roll(x, s) for s in (0, 1), (1, 0), (1, 1), (-1, 1) over (H, W); borders wrap around. Source: methods.md 5.1.
    Raises ValueError for other axes, TypeError for what is not floating point.
    """
    checks.maps("normalised", normalised)
    return torch.cat([normalised * normalised.roll(shift, dims=(-2, -1)) for shift in SHIFTS], dim=1)


def _of_one_scale(normalised: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 18) float64."""
    x = normalised.double()
    symmetric = torch.stack(_fit(x), dim=-1)  # (B, 1, 2)
    asymmetric = torch.stack(_fit_asymmetric(paired_products(x)), dim=-1)  # (B, 4, 4)
    return torch.cat([symmetric.flatten(1), asymmetric.flatten(1)], dim=1)


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised Gaussian of (B, C, H, W) by its moments: shape and variance, each (B, C)."""
    square, absolute = _mean(x.square()), _mean(x.abs())
    shapes, ratios = _ratios(x.device)
    return shapes[_nearest((square + NOTHING) / (absolute.square() + NOTHING), ratios)], square


def _fit_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian of (B, C, H, W): shape, mean, left and right variance, each (B, C)."""
    left, right = _mean(x.square(), x < 0), _mean(x.square(), x > 0)
    below, above = _root(left), _root(right)
    # (g^3 + 1)(g + 1) / (g^2 + 1)^2 of g = below / above, for above = 0 too
    skew = (below**3 + above**3) * (below + above)
    skew = (skew + NOTHING) / ((left + right).square() + NOTHING)
    ratio = (_mean(x.abs()).square() + NOTHING) / (_mean(x.square()) + NOTHING)
    shapes, ratios = _ratios(x.device)
    nearest = _nearest(ratio * skew, 1 / ratios)
    return shapes[nearest], (above - below) / ratios[nearest].sqrt(), left, right


def _ratios(device: torch.device) -> tuple[Tensor, Tensor]:
    """The shape parameters g that are tried, 0.2, 0.201 .. 10, and E[x^2] / E[|x|]^2 = Gamma(1/g) Gamma(3/g) / Gamma(2/g)^2 of each.

    A last entry is NaN, for moments that are.
    """
    shapes = torch.arange(200, 10001, dtype=torch.float64, device=device) / 1000
    one, two, three = (torch.lgamma(k / shapes) for k in (1, 2, 3))
    shapes, ratios = (F.pad(t, (0, 1), value=float("nan")) for t in (shapes, (one + three - 2 * two).exp()))
    return shapes, ratios


def _nearest(value: Tensor, table: Tensor) -> Tensor:
    """Where `table` is nearest to each value: a choice, which has no gradient."""
    distance = (value.detach().unsqueeze(-1) - table[:-1]).abs()
    return distance.argmin(dim=-1).where(~value.isnan(), -1)


def _mean(x: Tensor, where: Tensor | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C): the mean of all pixels, or of some, 0 if there are none."""
    if where is None:
        return x.sum(dim=-1).sum(dim=-1) / (x.shape[-2] * x.shape[-1])
    count = where.sum(dim=(-2, -1))
    return x.where(where | x.isnan(), 0).sum(dim=-1).sum(dim=-1) / count.clamp(min=1)


def _root(x: Tensor) -> Tensor:
    """Square root with the gradient 0 at 0."""
    return x.where(x != 0, 1).sqrt().where(x != 0, 0)
