"""The Gaussian (correntropy) distance between feature maps, of many taps in one call, each input read once."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor

from .. import checks, dispatch
from . import spec

__all__ = ["gaussian_distance"]

OP = spec.NAME


def gaussian_distance(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    *,
    sigma: float | Sequence[float] | str = 1.0,
    statistic: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""One minus a Gaussian kernel of the difference: quadratic for small differences, saturating at 1 for large ones.

    loss[i] = 1 - exp(-d2[i] / (2 sigma^2)),   d2[i] = sum or mean over all features f of (x[i, f] - y[i, f])^2

    It is evaluated as -expm1(-d2 / (2 sigma^2)), without cancellation for small differences. Lists of T taps, of different shapes, are
    one call of the kernel. Time O(T B F), memory O(T B) besides inputs and gradients. Differentiable twice, on every backend.

    Args:
        x: (B, *F), floating point (float32, bfloat16, float16; float64 on the CPU and reference backends), any strides; or a list or
            tuple of T such taps with their own features F_t and one batch size B.
        y: the same shapes, dtype and device. Under autocast dtypes may differ and the distance runs in float32.
        sigma: width of the Gaussian, in the unit of the root of d2: a number above 0; a sequence of T of them for lists; or "adaptive":
            sigma^2 = mean of d2 over the batch + 1e-12, for each tap, through which no gradient passes.
        statistic: "mean" divides d2 by the number of features, "sum" does not.
        reduction: over the batch: "mean", "sum" or "none".
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        A scalar, or (B,) for reduction "none"; for lists (T,), or (T, B). In the dtype of x (float32 under autocast), accumulated in
        float32 or better.

    Raises:
        TypeError: not floating-point tensors of one dtype, a list beside a tensor, or a sigma that is no number.
        ValueError: shapes or devices that do not match, no taps, a sigma that is not positive and finite or not one for each tap, an
            unknown option, a mean over no features or no samples.
        RuntimeError: the requested backend cannot run.
        NotImplementedError: forward mode or torch.func on a kernel backend (the reference has them).

    Source: SKD, eq. (3). The mean over features and both choices of sigma are our reading (methods.md 1): on a sum of many squares
    the Gaussian is 1 - 0, with a gradient of exactly 0.
    """
    xs, ys = _taps(x, y)
    _check(xs, ys, statistic, reduction)
    widths = _widths(sigma, x, len(xs))
    both = checks.for_distance(*xs, *ys)
    run = dispatch.implementation(OP, both, backend)
    distance: Tensor = run(list(both[: len(xs)]), list(both[len(xs) :]), widths, statistic == "mean", reduction)
    return distance.squeeze(0) if isinstance(x, Tensor) else distance


def _taps(x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Both as lists."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        checks.tensors(OP, x=x, y=y)
        return [x], [y]
    if not (isinstance(x, (list, tuple)) and isinstance(y, (list, tuple))):
        raise TypeError(
            f"{OP}: x is {type(x).__name__} and y is {type(y).__name__}, but each must be a torch.Tensor, or they must be two lists of "
            "taps."
        )
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"{OP}: x has {len(x)} taps and y has {len(y)}, but they must be lists of as many, at least one."
        )
    named = {f"{name}[{t}]": tap for name, taps in (("x", x), ("y", y)) for t, tap in enumerate(taps)}
    checks.tensors(OP, **named)
    return x, y


def _check(x: Sequence[Tensor], y: Sequence[Tensor], statistic: str, reduction: str) -> None:
    checks.choice(OP, "statistic", statistic, checks.STATISTICS)
    checks.choice(OP, "reduction", reduction, checks.REDUCTIONS)
    for t, (a, b) in enumerate(zip(x, y, strict=True)):
        if a.ndim < 2 or a.shape != b.shape or a.shape[0] != x[0].shape[0]:
            raise ValueError(
                f"{OP}: x {checks.describe(a)} and y {checks.describe(b)} (tap {t}), but they must be (B, *F) of one shape, "
                f"with B = {x[0].shape[0] if x[0].ndim else 'the batch size'} for every tap."
            )
        if statistic == "mean" and a.numel() == 0 == a.shape[1:].numel():
            raise ValueError(
                f"{OP}: the samples have no features {tuple(a.shape[1:])}, so they have no mean: use statistic='sum'."
            )
    if reduction == "mean" and x[0].shape[0] == 0:
        raise ValueError(f"{OP}: the batch is empty, so it has no mean: use reduction='sum' or 'none'.")


def _widths(sigma: float | Sequence[float] | str, x: Tensor | Sequence[Tensor], taps: int) -> list[float] | None:
    """One sigma for each tap; None for adaptive."""
    if isinstance(sigma, str):
        if sigma != "adaptive":
            raise ValueError(f"{OP}: sigma is {sigma!r}, but it must be a number above 0, or 'adaptive'.")
        return None
    if isinstance(sigma, (list, tuple)):
        widths = [float(checks.number(OP, "a sigma", s)) for s in sigma]
        if isinstance(x, Tensor) or len(widths) != taps:
            raise ValueError(
                f"{OP}: sigma has {len(widths)} numbers, but it must be one number, or one for each of the taps of a list ({taps} here)."
            )
    else:
        widths = [float(checks.number(OP, "sigma", sigma))] * taps
    for width in widths:
        if not 0 < width < inf:
            raise ValueError(f"{OP}: sigma is {width}, but it must be above 0 and finite, or 'adaptive'.")
    return widths


spec.register(gaussian_distance)
