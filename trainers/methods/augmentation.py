"""Augmentations that can be undone on a network's output: what label consistency rests on (DUKD, DCKD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Each is its own inverse, on images of any size. The transposition needs square ones.
OPERATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda image: 1 - image,
    lambda image: image.flip(-1),
    lambda image: image.flip(-2),
    lambda image: image.transpose(-1, -2),
)


class Augmentation:
    """Colour inversion, horizontal and vertical flip and transposition, each drawn per sample with probability p.

    `undo` goes through them in reverse order: in DUKD's code the order is the same, which is wrong where a transposition and a
    single flip meet (methods.md 6.7); DCKD's code has it right.
    """

    def __init__(self, generators: Sequence[torch.Generator], p: float, device: torch.device) -> None:
        drawn = torch.stack([torch.rand(len(OPERATIONS), generator=generator) for generator in generators])
        self.chosen = (drawn < p).to(device).T[:, :, None, None, None]  # (operations, m, 1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        for operation, chosen in zip(OPERATIONS, self.chosen, strict=True):
            images = operation(images).where(chosen, images)
        return images

    def undo(self, images: Tensor) -> Tensor:
        for operation, chosen in zip(OPERATIONS[::-1], self.chosen.flip(0), strict=True):
            images = operation(images).where(chosen, images)
        return images
