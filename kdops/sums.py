"""Sums whose bits do not depend on the number of threads."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

ROW = 2**12


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The "mean" or "sum" of all elements, or for "none" the loss as it is.

    On a CPU torch cuts a sum of more than 2^15 elements among its threads, but never a row of many: up to 2^27 elements have the same bits.
    """
    if reduction == "none":
        return loss
    flat = loss.flatten()
    if loss.device.type == "cpu":
        flat = F.pad(flat, (0, -flat.shape[0] % ROW)).view(-1, ROW).sum(dim=1)
    total = flat.sum()
    return total / loss.numel() if reduction == "mean" else total
