"""Contrastive distances: every anchor against shared or own negatives, each input read once, no (B, K, features) tensor."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sums import reduced
from . import spec

__all__ = ["contrastive_ratio", "matched_distance", "pairwise_distance"]


def pairwise_distance(x: Tensor, y: Tensor, *, p: int = 1, statistic: str = "mean", backend: str = "auto") -> Tensor:
    r"""Distance of every row of x to every row of y.

    d[i, k] = sum or mean over all features f of |x[i, f] - y[k, f]|^p

    Time O(B K F), memory O(B K) besides inputs and gradients; the broadcast form needs O(B K F).
    The gradient of |.| at a tie is 0, as in torch.

    Args:
        x: (B, *F), floating point (float32, bfloat16, float16; float64 on the CPU and reference backends), any strides.
        y: (K, *F), same dtype and device as x. Under autocast dtypes may differ and the distance runs in float32.
        p: 1 (L1) or 2 (squared L2).
        statistic: "mean" divides by the number of features, "sum" does not.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, K) in the dtype of x (float32 under autocast), accumulated in float32 or better.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes or devices that do not match, an unknown p, statistic or backend, a mean over no features.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the distance of contrastive distillation losses (CSD, DCKD eq. of L_dcl; L1 as in their code).
    """
    op = "pairwise_distance"
    checks.tensors(op, x=x, y=y)
    p = _check_options(op, p, statistic)
    if x.ndim < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{op}: x {checks.describe(x)} and y {checks.describe(y)}, but they must be (B, *F) and (K, *F) with the same features F."
        )
    x, y = checks.for_distance(x, y)
    distance: Tensor = dispatch.implementation(op, (x, y), backend)(x, y, p)
    return _finish(op, distance, x, x.shape[1:], statistic)


def matched_distance(
    anchor: Tensor, others: Tensor, *, p: int = 1, statistic: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Distance of each anchor to its own K others.

    d[i, k] = sum or mean over all features f of |anchor[i, f] - others[i, k, f]|^p

    Time O(B K F), memory O(B K) besides inputs and gradients.
    The gradient of |.| at a tie is 0, as in torch.

    Args:
        anchor: (B, *F), floating point (float32, bfloat16, float16; float64 on the CPU and reference backends), any strides.
        others: (B, K, *F), same dtype and device. Under autocast dtypes may differ and the distance runs in float32.
        p: 1 (L1) or 2 (squared L2).
        statistic: "mean" divides by the number of features, "sum" does not.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, K) in the dtype of anchor (float32 under autocast), accumulated in float32 or better.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as pairwise_distance.

    Source: DCKD's dynamic negatives, where every anchor has N degraded versions of itself.
    """
    op = "matched_distance"
    checks.tensors(op, anchor=anchor, others=others)
    p = _check_options(op, p, statistic)
    if anchor.ndim < 2 or others.ndim != anchor.ndim + 1 or _without_axis_1(others) != anchor.shape:
        raise ValueError(
            f"{op}: anchor {checks.describe(anchor)} and others {checks.describe(others)}, "
            "but they must be (B, *F) and (B, K, *F) with the same B and features F."
        )
    anchor, others = checks.for_distance(anchor, others)
    distance: Tensor = dispatch.implementation(op, (anchor, others), backend)(anchor, others, p)
    return _finish(op, distance, anchor, anchor.shape[1:], statistic)


def contrastive_ratio(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    p: int = 1,
    eps: float = 1e-7,
    statistic: str = "mean",
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Pull each anchor to its positive and push it from its negatives.

    loss[i] = d(anchor_i, positive_i) / (mean_k d(anchor_i, negative_k) + eps),   d(u, v) = sum or mean over features of |u - v|^p

    Time O(B K F), memory O(B K) besides inputs and gradients.

    Args:
        anchor: (B, *F), floating point (float32, bfloat16, float16; float64 on the CPU and reference backends), any strides.
        positive: (B, *F), same dtype and device.
        negatives: (K, *F), shared by all anchors, or (B, K, *F), each anchor's own.
        p: 1 (L1) or 2 (squared L2).
        eps: added to the mean distance to the negatives, in the unit of d.
        statistic: "mean" or "sum" over the features; it matters only beside eps.
        mask: (B, K) bool, True where a negative counts for an anchor. A sample without any has loss 0 and no gradient.
            Gradients with p = 2 need finite numbers in negatives that do not count, too.
        reduction: "mean" over the batch, "sum", or "none".
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A scalar, or (B,) for reduction "none", in the dtype of anchor (float32 under autocast). The ratio is formed in float32 or better.

    Raises:
        TypeError: not floating-point tensors of one dtype, a mask that is not bool, or an eps that is no number.
        ValueError: shapes or devices that do not match, an unknown option, eps below 0, no negatives (K = 0) or features, an empty
            batch under "mean".
        RuntimeError: the requested backend cannot run.
        NotImplementedError: double backward, forward mode or torch.func on a kernel backend (the reference has them).

    Source: the ratio of AECR-Net, CSD and DCKD (methods.md 3a, 5.3), per sample as FACD needs it (our reading, methods.md 4a).
    """
    op = "contrastive_ratio"
    checks.tensors(op, anchor=anchor, positive=positive, negatives=negatives)
    p = _check_options(op, p, statistic)
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    _check_ratio_shapes(op, anchor, positive, negatives, mask)
    eps = checks.number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, but it must be a number of at least 0.")
    if reduction == "mean" and anchor.shape[0] == 0:
        raise ValueError(f"{op}: the batch is empty, so it has no mean: use reduction='sum' or 'none'.")
    anchor, positive, negatives = checks.for_distance(anchor, positive, negatives)
    distance = dispatch.implementation(op, (anchor, positive, negatives), backend)
    count = 1 if statistic == "sum" else prod(anchor.shape[1:])
    to_positive = _accumulating(distance(anchor, positive.unsqueeze(1), p).squeeze(1)) / count  # (B,)
    to_negatives = _accumulating(distance(anchor, negatives, p)) / count  # (B, K)
    if mask is None:
        loss = to_positive / (to_negatives.mean(dim=1) + eps)
    else:
        counted = mask.sum(dim=1)
        some = counted > 0
        mean = to_negatives.where(mask, 0).sum(dim=1) / counted.clamp(min=1)
        # The denominator is replaced before the division: a division by eps = 0 in an unused branch would still poison the gradient.
        loss = (to_positive / (mean + eps).where(some, 1)).where(some, 0)
    return reduced(loss, reduction).to(anchor.dtype)


def _accumulating(distance: Tensor) -> Tensor:
    """The reference gives distances in the dtype of its inputs, kernels in the dtype they accumulate in: go on in the latter."""
    return distance if distance.dtype == torch.float64 else distance.float()


def _finish(op: str, distance: Tensor, like: Tensor, features: tuple[int, ...], statistic: str) -> Tensor:
    if statistic == "mean":
        count = prod(features)
        if count == 0:
            raise ValueError(
                f"{op}: the rows have no features {tuple(features)}, so they have no mean: use statistic='sum'."
            )
        distance = distance / count
    return distance.to(like.dtype)


def _check_options(op: str, p: object, statistic: object) -> int:
    """p, as an int."""
    checks.choice(op, "statistic", statistic, checks.STATISTICS)
    return checks.choice(op, "p", p, (1, 2))


def _without_axis_1(t: Tensor) -> torch.Size:
    return t.shape[:1] + t.shape[2:]


def _check_ratio_shapes(op: str, anchor: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None) -> None:
    shared = negatives.shape[1:] == anchor.shape[1:] and negatives.ndim == anchor.ndim
    own = negatives.ndim == anchor.ndim + 1 and _without_axis_1(negatives) == anchor.shape
    if anchor.ndim < 2 or positive.shape != anchor.shape or not (shared or own):
        raise ValueError(
            f"{op}: anchor {checks.describe(anchor)}, positive {checks.describe(positive)}, negatives {checks.describe(negatives)}, "
            "but they must be (B, *F), (B, *F) and (K, *F) or (B, K, *F) with the same features F."
        )
    count = negatives.shape[1] if own else negatives.shape[0]
    if count == 0 or prod(anchor.shape[1:]) == 0:
        raise ValueError(
            f"{op}: negatives {checks.describe(negatives)}, but there must be at least one negative and one feature."
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask is {getattr(mask, 'dtype', type(mask).__name__)}, but it must be a bool tensor.")
    if mask.shape != (anchor.shape[0], count) or mask.device != anchor.device:
        raise ValueError(
            f"{op}: mask {tuple(mask.shape)} on {mask.device}, but it must be (B, K) = ({anchor.shape[0]}, {count}) on {anchor.device}."
        )


for _function in (pairwise_distance, matched_distance, contrastive_ratio):
    spec.register(_function)
