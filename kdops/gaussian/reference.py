"""The definition of the Gaussian distance, in eager torch: oracle of the tests and portable fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registration import accumulator

ADAPTIVE_FLOOR = 1e-12  # added to an adaptive sigma^2: identical inputs have distance 0, not 0/0


def gaussian_distance(
    x: Sequence[Tensor], y: Sequence[Tensor], sigma: Sequence[float] | None, mean: bool, reduction: str
) -> Tensor:
    """Taps x[t] and y[t] (B, *F_t), one sigma for each (None: adaptive) -> (T,), or (T, B) for reduction "none", in their dtype."""
    taps = []
    for t, (a, b) in enumerate(zip(x, y, strict=True)):
        wide = accumulator(a)  # squares of large differences overflow in float16
        squares = (a.to(wide) - b.to(wide)).square().flatten(1)  # (B, F)
        d2 = (squares.mean if mean else squares.sum)(dim=1)
        # A product, because ** would raise for a sigma beyond 1e154.
        variance = d2.detach().mean() + ADAPTIVE_FLOOR if sigma is None else sigma[t] * sigma[t]
        taps.append(-torch.expm1(-d2 / (2 * variance)))
    distance = torch.stack(taps)
    reduced: Tensor = distance if reduction == "none" else getattr(distance, reduction)(dim=1)
    return reduced.to(x[0].dtype)
