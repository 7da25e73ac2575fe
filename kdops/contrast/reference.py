"""The definition of the contrastive distances, in eager torch: oracle of the tests and portable fallback.

It holds a (B, K, features) tensor, which is what the kernels exist to avoid.
"""

from __future__ import annotations

from torch import Tensor

from ..registration import accumulator


def pairwise_distance(x: Tensor, y: Tensor, p: int) -> Tensor:
    """x (B, *F), y (K, *F) -> (B, K): sum over the features of |x_i - y_k|^p."""
    return matched_distance(x, y.unsqueeze(0), p)


def matched_distance(anchor: Tensor, others: Tensor, p: int) -> Tensor:
    """anchor (B, *F), others (B, K, *F) -> (B, K): sum over the features of |anchor_i - others_ik|^p."""
    wide = accumulator(anchor)  # a sum of many features would overflow in float16
    difference = anchor.to(wide).unsqueeze(1) - others.to(wide)  # (B, K, *F)
    terms = difference.abs() if p == 1 else difference.square()
    return terms.sum(dim=tuple(range(2, terms.ndim)))
