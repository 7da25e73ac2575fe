# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The locally normalised image as Triton kernels: one launch along the rows, one along the columns, each way.

Values are taken relative to the centre of the window, and the variance is the mean square of what the mean leaves: no difference of large
numbers. Backward takes the statistics from forward's results, and gathers for each pixel from the windows that cover it: no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .reference import TINY

ROWS = 8  # of a tile, from one plane of the image or several
COLUMNS = 64
TAPS = tl.constexpr(32)  # the widest window has 31
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _tables(tables, window, factor: tl.float32, TAPS: tl.constexpr):
    """tables[0, i]: the weight of tap i; tables[1, i]: the sum of the weights before it."""
    i = tl.arange(0, TAPS)
    distance = (i - window // 2).to(tl.float32)
    weights = tl.where(i < window, tl.exp(distance * distance * factor), 0.0)
    weights = weights / tl.sum(weights, 0)
    tiles.store(tables + i, weights, i < TAPS)
    tiles.store(tables + TAPS + i, tl.cumsum(weights, 0) - weights, i < TAPS)


@triton.jit
def _tile(H, W, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: rows (ROWS, 1) of all planes, and of their plane; columns (1, COLUMNS); which of them there are."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(W, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    x = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, row % H, x, (row < rows) & (x < W)


@triton.jit
def _padded(position, size, inside, REPLICATE: tl.constexpr):
    """A position along an axis that may lie beyond it: the one to read, and whether there is one."""
    if REPLICATE:
        position = tl.minimum(tl.maximum(position, 0), size - 1)
    else:
        inside = inside & (position >= 0) & (position < size)
    return position, inside


@triton.jit
def _tap(
    pixels,
    offsets,
    variances,
    i,
    row,
    y,
    x,
    inside,
    H,
    W,
    stride_y,
    stride_x,
    WINDOW: tl.constexpr,
    REPLICATE: tl.constexpr,
):
    """The i-th pixel of a row's window with variance 0; or that of a column's, its row's offset to be added, and variance."""
    if offsets is not None:
        qy, exists = _padded(y + i - WINDOW // 2, H, inside, REPLICATE)
        at = (row - y + qy) * W + x
        value = tiles.load(pixels + qy * stride_y + x * stride_x, exists)
        offset = tiles.load(offsets + at, exists)
        spread = tiles.load(variances + at, exists)
    else:
        qx, exists = _padded(x + i - WINDOW // 2, W, inside, REPLICATE)
        value = tiles.load(pixels + y * stride_y + qx * stride_x, exists)
        offset = tl.zeros(value.shape, tl.float32)
        spread = offset
    return value, offset, spread


@triton.jit(do_not_specialize=["C", "H", "W", "rows"])
def _statistics(
    image,  # (B, C, H, W), any strides
    tables,  # (2, TAPS)
    offsets,  # (B, C, H, W) float32: of rows, where this goes along columns, else None
    variances,
    first,  # of rows: offsets; of columns: normalised
    second,  # of rows: variances; of columns: local_std
    C,
    H,
    W,
    rows,  # B C H
    c: tl.float32,
    tiny: tl.float32,
    stride_b: tl.int64,
    stride_c: tl.int64,
    stride_y: tl.int64,
    stride_x: tl.int64,
    WINDOW: tl.constexpr,
    REPLICATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and variance of the window of each pixel along one axis, relative to the pixel; of columns, what becomes of them."""
    row, y, x, inside = _tile(H, W, rows, ROWS, COLUMNS)
    pixels = image + row // H // C * stride_b + row // H % C * stride_c
    centre = tiles.load(pixels + y * stride_y + x * stride_x, inside)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    variance = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(WINDOW):
        value, offset, _ = _tap(
            pixels, offsets, variances, i, row, y, x, inside, H, W, stride_y, stride_x, WINDOW, REPLICATE
        )
        mean += tl.load(tables + i) * ((value - centre) + offset)
    for i in range(WINDOW):
        value, offset, spread = _tap(
            pixels, offsets, variances, i, row, y, x, inside, H, W, stride_y, stride_x, WINDOW, REPLICATE
        )
        deviation = ((value - centre) + offset) - mean
        variance += tl.load(tables + i) * (spread + deviation * deviation)
    at = row * W + x
    if offsets is None:
        tiles.store(first + at, mean, inside)
        tiles.store(second + at, variance, inside)
    else:
        std = tl.sqrt(variance + tiny)
        tiles.store(first + at, -mean / (std + c), inside)
        tiles.store(second + at, std, inside)


@triton.jit
def _slopes(at, exists, normalised, std, grad_normalised, grad_std, c):
    """What windows pass on: a, negated, to the mean, and b, twice, to the variance; d is the pixel less the mean."""
    n = tiles.load(normalised + at, exists)
    s = tl.where(exists, tiles.load(std + at, exists), 1.0)
    a = tl.zeros(n.shape, tl.float32)
    b = a
    if grad_normalised is not None:
        a = tiles.load(grad_normalised + at, exists) / (s + c)
    if grad_std is not None:
        b = tiles.load(grad_std + at, exists)
    # Where std overflows normalised is 0, and infinity times that would be NaN.
    return a, (b - a * n) / s, n * tl.minimum(s + c, LARGEST)


@triton.jit
def _covering(tables, i, position, last, WINDOW: tl.constexpr, REPLICATE: tl.constexpr, TAPS: tl.constexpr):
    """The weight of a pixel in the i-th window that covers it: the border pixels stand for the padding as well."""
    weight = tl.load(tables + i) + tl.zeros(position.shape, tl.float32)
    if REPLICATE:
        weight += tl.where(position == 0, tl.load(tables + TAPS + WINDOW - 1 - i), 0.0)
        weight += tl.where(position == last, tl.load(tables + TAPS + i), 0.0)
    return weight


@triton.jit(do_not_specialize=["C", "H", "W", "rows"])
def _gather_columns(
    image,  # (B, C, H, W), any strides
    tables,  # (2, TAPS)
    normalised,  # (B, C, H, W), as all that follow
    std,
    grad_normalised,  # or None
    grad_std,
    sums,  # float32: what a pixel receives from the windows of its column
    spreads,  # and what one beside it receives more, for each unit that it exceeds the pixel
    direct,  # what a pixel receives besides
    C,
    H,
    W,
    rows,
    c: tl.float32,
    stride_b: tl.int64,
    stride_c: tl.int64,
    stride_y: tl.int64,
    stride_x: tl.int64,
    WINDOW: tl.constexpr,
    REPLICATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
):
    row, y, x, inside = _tile(H, W, rows, ROWS, COLUMNS)
    pixels = image + row // H // C * stride_b + row // H % C * stride_c + x * stride_x
    value = tiles.load(pixels + y * stride_y, inside)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    spread = sum
    for i in range(WINDOW):
        qy, exists = _padded(y + i - WINDOW // 2, H, inside, False)
        a, b, d = _slopes((row - y + qy) * W + x, exists, normalised, std, grad_normalised, grad_std, c)
        weight = _covering(tables, i, y, H - 1, WINDOW, REPLICATE, TAPS)
        sum += weight * (b * ((value - tiles.load(pixels + qy * stride_y, exists)) + d) - a)
        spread += weight * b
    at = row * W + x
    a, b, d = _slopes(at, inside, normalised, std, grad_normalised, grad_std, c)
    tiles.store(sums + at, sum, inside)
    tiles.store(spreads + at, spread, inside)
    tiles.store(direct + at, a, inside)


@triton.jit(do_not_specialize=["C", "H", "W", "rows"])
def _gather_rows(
    image,  # (B, C, H, W), any strides
    tables,  # (2, TAPS)
    sums,  # of columns
    spreads,
    direct,
    gradient,  # of the image, any strides
    C,
    H,
    W,
    rows,
    stride_b: tl.int64,
    stride_c: tl.int64,
    stride_y: tl.int64,
    stride_x: tl.int64,
    gradient_b: tl.int64,
    gradient_c: tl.int64,
    gradient_y: tl.int64,
    gradient_x: tl.int64,
    WINDOW: tl.constexpr,
    REPLICATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
):
    row, y, x, inside = _tile(H, W, rows, ROWS, COLUMNS)
    plane = row // H
    pixels = image + plane // C * stride_b + plane % C * stride_c + y * stride_y
    value = tiles.load(pixels + x * stride_x, inside)
    result = tiles.load(direct + row * W + x, inside)
    for i in range(WINDOW):
        qx, exists = _padded(x + i - WINDOW // 2, W, inside, False)
        at = row * W + qx
        weight = _covering(tables, i, x, W - 1, WINDOW, REPLICATE, TAPS)
        beyond = value - tiles.load(pixels + qx * stride_x, exists)
        result += weight * (tiles.load(sums + at, exists) + tiles.load(spreads + at, exists) * beyond)
    at = plane // C * gradient_b + plane % C * gradient_c + y * gradient_y + x * gradient_x
    tiles.store(gradient + at, result, inside)


# --- launchers -------------------------------------------------------------------------------------------------------------------


def mscn(image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) -> normalised, local_std, contiguous."""
    normalised, std = (image.new_empty(image.shape) for _ in range(2))
    if image.numel():
        call = _Call(image, window, sigma, c, replicate)
        of_rows = call.maps(2)
        call.statistics((None, None), of_rows)
        call.statistics(of_rows, (normalised, std))
    return normalised, std


def mscn_backward(
    grad_normalised: Tensor | None,
    grad_std: Tensor | None,
    image: Tensor,
    normalised: Tensor,
    std: Tensor,
    window: int,
    sigma: float,
    c: float,
    replicate: bool,
) -> Tensor:
    """The gradient of the image, from that of either result or of both, and the results; all in float32."""
    gradient = torch.empty_like(image)
    if image.numel():
        call = _Call(image, window, sigma, c, replicate)
        upstream = [None if grad is None else grad.contiguous() for grad in (grad_normalised, grad_std)]
        call.gather((normalised, std, *upstream), gradient)
    return gradient


class _Call:
    """One image and the options that all its launches share."""

    def __init__(self, image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> None:
        b, channels, h, w = image.shape
        self.image, self.c, self.window, self.replicate = image, c, window, replicate
        self.sizes = (channels, h, w, b * channels * h)
        self.grid = (tiles.cdiv(b * channels * h, ROWS) * tiles.cdiv(w, COLUMNS),)
        # Made on the device, because a copy from the host would wait for it.
        self.tables = image.new_empty((2, TAPS.value), dtype=torch.float32)
        _tables[(1,)](self.tables, window, -1 / (2 * sigma * sigma), TAPS, num_warps=1, **tiles.OPTIONS)

    def maps(self, count: int) -> tuple[Tensor, ...]:
        return self.image.new_empty((count, *self.image.shape), dtype=torch.float32).unbind()

    def statistics(self, of_rows: tuple[Tensor | None, ...], results: tuple[Tensor, ...]) -> None:
        _statistics[self.grid](
            self.image,
            self.tables,
            *of_rows,
            *results,
            *self.sizes,
            self.c,
            TINY,
            *self.image.stride(),
            self.window,
            self.replicate,
            ROWS,
            COLUMNS,
            num_warps=4,
            **tiles.OPTIONS,
        )

    def gather(self, windows: tuple[Tensor | None, ...], gradient: Tensor) -> None:
        of_columns = self.maps(3)
        options = (self.window, self.replicate, ROWS, COLUMNS, TAPS)
        launch: dict[str, Any] = {"num_warps": 4, **tiles.OPTIONS}
        strides = self.image.stride()
        _gather_columns[self.grid](
            self.image, self.tables, *windows, *of_columns, *self.sizes, self.c, *strides, *options, **launch
        )
        _gather_rows[self.grid](
            self.image,
            self.tables,
            *of_columns,
            gradient,
            *self.sizes,
            *strides,
            *gradient.stride(),
            *options,
            **launch,
        )
