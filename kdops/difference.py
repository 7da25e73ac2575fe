"""The C++ step that CPU implementations of distances between products share: subtract in place and measure."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import LIBRARY

LIBRARY.define("difference_(Tensor(a!) x, Tensor y, int p) -> Tensor")


def difference_(x: Tensor, y: Tensor, p: int) -> Tensor:
    """x and y (G, R, T), float32 or float64 -> (G,) float64: the sums of |x - y|^p.

    x becomes sign(x - y) for p = 1 and x - y for p = 2. Its rows or its columns lie side by side; y has any strides.
    """
    sums: Tensor = torch.ops.kdops.difference_.default(x, y, p)
    return sums
