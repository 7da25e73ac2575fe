"""Two ways around a network when pictures are restored: tile by tile, so that memory does not grow with the image, and averaged over
the eight orientations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Restorer = Callable[[Tensor], Tensor]  # (B, C, h, w) -> (B, C, scale * h, scale * w), in [0, 1]


OVERLAP = 32  # pixels of the input that neighbouring tiles share


class Around(nn.Module):
    """Base of what is put around a restorer; a network stays a submodule, so that eval() and to() reach it."""

    def __init__(self, restorer: Restorer) -> None:
        super().__init__()
        self.restorer = restorer


class Tiled(Around):
    """Restores tiles of tile x tile input pixels that overlap, and blends them.

    Of the overlap, the outer quarters, where a tile lacks its surroundings, are left out; over the half between them, the
    weights go linearly from one tile to the next. So where an output pixel depends on no input farther away than a quarter of
    the overlap, the result is that of the whole image, up to rounding.
    """

    def __init__(
        self, restorer: Restorer, tile: int, *, overlap: int | None = None, scale: int = 1, multiple_of: int = 1
    ) -> None:
        """
        Args:
            tile: side of a tile in pixels of the input.
            overlap: pixels of the input that neighbouring tiles share, a multiple of 4, at most half a tile; None: 32, or the next
                multiple of `multiple_of`.
            multiple_of: the network's: tiles begin at its multiples, as a U-shaped network's pixel grids need.

        Raises:
            ValueError: a tile or an overlap that does not fit.
        """
        super().__init__(restorer)
        overlap = -(-OVERLAP // multiple_of) * multiple_of if overlap is None else overlap
        if overlap < 4 or overlap % 4 or 2 * overlap > tile:
            raise ValueError(
                f"overlap must be a multiple of 4, at least 4 and at most half the tile, got {overlap} for {tile}"
            )
        if tile % multiple_of or overlap % multiple_of:
            raise ValueError(
                f"tile {tile} and overlap {overlap} must be multiples of {multiple_of}, as the network needs"
            )
        self.tile, self.overlap, self.scale, self.multiple_of = tile, overlap, scale, multiple_of

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if max(height, width) <= self.tile:
            return self.restorer(image)
        scale = self.scale
        total = image.new_zeros(*image.shape[:-2], height * scale, width * scale)
        weights = image.new_zeros(height * scale, width * scale)
        for top, bottom in self.spans(height):
            for left, right in self.spans(width):
                restored = self.restorer(image[..., top:bottom, left:right])
                rows = self.ramps(top, bottom, height).to(restored)
                weight = rows[:, None] * self.ramps(left, right, width).to(restored)
                place = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
                total[place] += restored * weight
                weights[place] += weight
        return total / weights

    def spans(self, size: int) -> list[tuple[int, int]]:
        """First and last + 1 pixel of the tiles along an axis. The last one ends with the image, and may be a little longer."""
        if size <= self.tile:
            return [(0, size)]
        last = (size - self.tile) // self.multiple_of * self.multiple_of
        starts = [*range(0, last, self.tile - self.overlap), last]
        return [(start, size if start == last else start + self.tile) for start in starts]

    def ramps(self, start: int, stop: int, size: int) -> Tensor:
        """Weights (scale * (stop - start),) of a tile's output along an axis: 0, a ramp, 1, a ramp, 0; 1 at the image's border."""
        skipped, ramp = self.overlap * self.scale // 4, self.overlap * self.scale // 2
        place = torch.arange((stop - start) * self.scale) + 0.5
        weight = torch.ones_like(place)
        if start > 0:
            weight = weight.minimum((place - skipped) / ramp)
        if stop < size:
            weight = weight.minimum((place.flip(0) - skipped) / ramp)
        return weight.clamp(0, 1)


class SelfEnsemble(Around):
    """The mean of what a restorer makes of the eight orientations of an image, each turned back (Timofte et al., CVPR 2016)."""

    def forward(self, image: Tensor) -> Tensor:
        total = sum(oriented(self.restorer(oriented(image, turn)), turn, back=True) for turn in range(8))
        assert isinstance(total, Tensor)
        return total / 8


def oriented(image: Tensor, turn: int, *, back: bool = False) -> Tensor:
    """(..., H, W) in one of the eight orientations of a rectangle, or back from it."""
    axes = [axis for bit, axis in ((1, -2), (2, -1)) if turn & bit]
    if back:
        return (image.mT if turn & 4 else image).flip(axes)
    flipped = image.flip(axes)
    return flipped.mT if turn & 4 else flipped
