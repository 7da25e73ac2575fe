"""Contrast between images in the feature space of a frozen network: AECR-Net's loss, as CSD, SKD and DCKD use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kdops
from trainers.data.resize import imresize

Levels = Sequence[Tensor]


def level_weights(count: int) -> list[float]:
    """1 for the deepest level, and 2^-2, 2^-3, ... before it: 1/32, 1/16, 1/8, 1/4, 1 for five (methods.md 5.3)."""
    return [*(2.0 ** (level - count - 1) for level in range(1, count)), 1.0]


def contrast(anchor: Levels, positive: Levels, negatives: Levels, eps: float) -> Tensor:
    r"""sum_l w_l d(a_l, p_l) / (mean_k d(a_l, n_lk) + eps mean |p_l|), per sample, d(u, v) = mean |u - v|.

    The ratio is per sample, so that a batch may be split (the codes divide batch means: our reading), and its eps is relative to
    the positive's features: with an absolute 1e-7 it reads 9e6 where the anchor starts at the negative (methods.md 8).

    Args:
        anchor: L maps (B, C, h, w).
        positive: the same, without gradient.
        negatives: (K, C, h, w) for all anchors, or (B, K, C, h, w), without gradient.
        eps: smallest denominator, relative to the positive's features.

    Returns:
        (B,).
    """
    total = torch.zeros((), device=anchor[0].device)
    for weight, a, p, n in zip(level_weights(len(anchor)), anchor, positive, negatives, strict=True):
        to_positive = kdops.matched_distance(a, p.unsqueeze(1)).squeeze(1)  # (B,)
        distance = kdops.matched_distance if n.ndim == a.ndim + 1 else kdops.pairwise_distance
        to_negatives = distance(a, n).mean(dim=1)
        total = total + weight * to_positive / (to_negatives + eps * p.abs().flatten(1).mean(dim=1))
    return total


def degraded(lq: Tensor, scale: int) -> Tensor:
    """The degraded image at the size of the output: in super-resolution, the bicubically upscaled input (methods.md 8)."""
    return imresize(lq, scale) if scale > 1 else lq
