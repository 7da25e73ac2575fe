"""Reading tensors of any strides as flat rows without a copy, where their layout allows it.

A sum over features does not care in which order they come, so two tensors whose features share one dense layout
(contiguous, channels_last, permuted) can both be read as contiguous rows.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def flat_rows(first: Tensor, second: Tensor, leading: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both tensors as contiguous-in-memory rows over the same order of features; copies only where the layouts differ.

    Args:
        first: leading[0] axes of rows, then the features (*F).
        second: leading[1] axes of rows, then the same features.

    Returns:
        Two 2-D views or copies, (rows, features), contiguous.
    """
    a, b = leading
    features = prod(first.shape[a:])
    shared = _strides(first, a) == _strides(second, b)
    if not (shared and _has_flat_rows(first, a) and _has_flat_rows(second, b)):
        first, second = first.contiguous(), second.contiguous()
    shapes = [(prod(t.shape[:n]), features) for t, n in ((first, a), (second, b))]
    return first.as_strided(shapes[0], (features, 1)), second.as_strided(shapes[1], (features, 1))


def gradient_rows(t: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """An empty gradient with the dense strides of `t`, and the rows to write it through; `flat` is what flat_rows gave for `t`.

    The rows are a view of the gradient where `t` was read without a copy, else a buffer that `settle` copies back.
    """
    gradient = torch.empty_like(t)
    if flat.data_ptr() == t.data_ptr():
        return gradient, gradient.as_strided(flat.shape, flat.stride())
    return gradient, torch.empty_like(flat)


def settle(gradient: Tensor, rows: Tensor) -> Tensor:
    """The gradient, once its rows are written."""
    if rows.data_ptr() != gradient.data_ptr():
        gradient.copy_(rows.view(gradient.shape))
    return gradient


class GradientColumns:
    """The gradient of a feature map (B, C, *S), with its dense strides, to be written as `columns` (B, C, N); empty where not needed."""

    def __init__(self, like: Tensor, needed: bool) -> None:
        self.needed = needed
        self.result = torch.empty_like(like) if needed else like.new_empty(0)
        self.columns = (
            self.result.flatten(2) if needed else self.result
        )  # a view, where positions are a fixed stride apart

    def finish(self) -> Tensor:
        """The gradient, once its columns are written."""
        return settle(self.result, self.columns)


def _strides(t: Tensor, leading: int) -> list[tuple[int, int]]:
    """Size and stride of every feature axis that has more than one element (the stride of the others means nothing)."""
    return [(size, stride) for size, stride in zip(t.shape[leading:], t.stride()[leading:], strict=True) if size > 1]


def _has_flat_rows(t: Tensor, leading: int) -> bool:
    """Whether the features are dense and every row directly follows the one before."""
    expected = 1
    for size, stride in sorted(_strides(t, leading), key=lambda axis: axis[1]):
        if stride != expected:
            return False
        expected *= size
    for axis in reversed(range(leading)):
        if t.shape[axis] > 1 and t.stride(axis) != expected:
            return False
        expected *= t.shape[axis]
    return True
