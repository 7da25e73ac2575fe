"""Crops of restored images side by side, embedded as PNG, at a zoom that keeps pixels square.

Where to look is decided by the baseline's error alone (bicubic upsampling, or the input where it has the same size): its worst
windows. No method has a say in it, so no method is flattered by it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)

WINDOW = 48  # ground-truth pixels; divisible by the usual scales, and shown three times enlarged
ERROR_GAIN = 5


@dataclass(frozen=True)
class Window:
    """A square of ground-truth pixels."""

    top: int
    left: int
    size: int


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def worst_windows(baseline: Pixels, gt: Pixels, scale: int, count: int = 2) -> list[Window]:
    """The `count` windows in which the baseline is worst (mean squared error), not overlapping, on the grid of the degraded image."""
    size = min(WINDOW, *gt.shape[:2]) // scale * scale
    error = np.square(baseline.astype(np.float64) - gt).mean(axis=2)
    total = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    sums = (total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size])[::scale, ::scale]
    windows = []
    for _ in range(count):
        row, column = np.unravel_index(sums.argmax(), sums.shape)
        if not np.isfinite(sums[row, column]):
            break
        windows.append(Window(int(row) * scale, int(column) * scale, size))
        near = size // scale - 1  # windows nearer than their size overlap
        sums[max(row - near, 0) : row + near + 1, max(column - near, 0) : column + near + 1] = -np.inf
    return windows


def cut(image: Pixels, window: Window, scale: int = 1) -> Pixels:
    """The window of an image that is `scale` times smaller than the ground truth."""
    top, left, size = window.top // scale, window.left // scale, window.size // scale
    return image[top : top + size, left : left + size]


def error_map(image: Pixels, gt: Pixels) -> Pixels:
    """|image - gt|, mean over channels, ERROR_GAIN times amplified: grey, black where they agree."""
    error = np.abs(image.astype(np.float64) - gt).mean(axis=2) * ERROR_GAIN
    return np.stack([error.clip(0, 255).astype(np.uint8)] * 3, axis=2)


def embed(image: Pixels, kind: str = "PNG") -> str:
    """The image as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def locator(gt: Pixels, window: Window) -> str:
    """The whole image, small, with the window marked: an SVG."""
    height, width = gt.shape[:2]
    small = Image.fromarray(gt)
    small.thumbnail((288, 288))
    box = f'<rect x="{window.left}" y="{window.top}" width="{window.size}" height="{window.size}" fill="none"'
    edge = max(height, width) / 75
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="the crop in its image">'
        f'<image href="{embed(np.asarray(small), "JPEG")}" width="{width}" height="{height}"/>'
        f'{box} stroke="#ffffff" stroke-width="{2 * edge:.1f}"/>{box} stroke="#d55e00" stroke-width="{edge:.1f}"/></svg>'
    )
