"""Points between pixels, drawn into an image: what rain streaks and motion paths are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def splat(
    rows: npt.NDArray[np.float64],
    columns: npt.NDArray[np.float64],
    mass: npt.NDArray[np.float64],
    height: int,
    width: int,
) -> npt.NDArray[np.float64]:
    """Points between pixels -> (height, width): each gives its mass to the four pixels around it, by nearness."""
    top, left = np.floor(rows), np.floor(columns)
    image = np.zeros(height * width)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        share = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column)) * mass
        index = (row[inside] * width + column[inside]).astype(np.int64)
        image += np.bincount(index, share[inside], minlength=height * width)
    return image.reshape(height, width)
