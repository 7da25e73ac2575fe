# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""The locally normalised image as Triton kernels: one launch along the rows, one along the columns, each way.

Values are taken relative to the centre of the window, and the variance is the mean square of what the mean leaves: no difference of large
numbers. Backward makes what each window passes on, then gathers for each pixel from the windows that cover it: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .reference import TINY

ROWS = 8  # of a tile, from one plane of the image or several
COLUMNS = 64
TAPS = tl.constexpr(32)  # the widest window has 31


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
def _tile(W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: rows (ROWS, 1), counted through all planes, and columns (1, COLUMNS)."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(W, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    return row, program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]


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
    grad_normalised,  # (B, C, H, W) or None; only backward
    grad_std,
    first,  # of rows: offsets; forward: normalised; backward: the gradient of a window's mean
    second,  # of rows: variances; forward: local_std; backward: twice the gradient of a window's variance
    means,  # None, or, backward, the mean of a window relative to its pixel
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
    row, x = _tile(W, ROWS, COLUMNS)
    y = row % H
    inside = (row < rows) & (x < W)
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
        normalised = -mean / (std + c)
        if means is None:
            tiles.store(first + at, normalised, inside)
            tiles.store(second + at, std, inside)
        else:
            to_mean = tl.zeros((ROWS, COLUMNS), tl.float32)
            if grad_normalised is not None:
                to_mean -= tiles.load(grad_normalised + at, inside) / (std + c)
            to_variance = to_mean * normalised
            if grad_std is not None:
                to_variance += tiles.load(grad_std + at, inside)
            tiles.store(first + at, to_mean, inside)
            tiles.store(second + at, to_variance / std, inside)
            tiles.store(means + at, mean, inside)


@triton.jit(do_not_specialize=["C", "H", "W", "rows"])
def _gather(
    image,  # (B, C, H, W), any strides
    tables,  # (2, TAPS)
    offsets,  # (B, C, H, W) float32: of rows, where this goes along columns, else None
    means,  # of the windows: those of columns, or of rows
    to_mean,  # the gradients of their means
    to_variance,  # and twice those of their variances
    direct,  # None, or what a pixel receives besides, negated: to_mean of columns
    first,  # of columns: the gradients of the means of rows, contiguous; of rows: that of the image, any strides
    second,  # of columns: twice the gradients of the variances of rows; of rows: None
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
    """What each value v receives from the windows q that cover it: sum of weight (to_variance_q (v - mean_q) + to_mean_q)."""
    row, x = _tile(W, ROWS, COLUMNS)
    y = row % H
    plane = row // H
    inside = (row < rows) & (x < W)
    pixels = image + plane // C * stride_b + plane % C * stride_c
    value = tiles.load(pixels + y * stride_y + x * stride_x, inside)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    spread = tl.zeros((ROWS, COLUMNS), tl.float32)
    own = 0.0
    if offsets is not None:
        own = tiles.load(offsets + row * W + x, inside)
    for i in range(WINDOW):
        if offsets is not None:
            qy, exists = _padded(y + i - WINDOW // 2, H, inside, False)
            at = (row - y + qy) * W + x
            centre = tiles.load(pixels + qy * stride_y + x * stride_x, exists)
            position = y
            last = H - 1
        else:
            qx, exists = _padded(x + i - WINDOW // 2, W, inside, False)
            at = row * W + qx
            centre = tiles.load(pixels + y * stride_y + qx * stride_x, exists)
            position = x
            last = W - 1
        weight = tl.load(tables + i) + tl.zeros(position.shape, tl.float32)
        if REPLICATE:  # the border pixels stand for the padding as well
            weight += tl.where(position == 0, tl.load(tables + TAPS + WINDOW - 1 - i), 0.0)
            weight += tl.where(position == last, tl.load(tables + TAPS + i), 0.0)
        slope = tiles.load(to_variance + at, exists)
        deviation = ((value - centre) + own) - tiles.load(means + at, exists)
        sums += weight * (slope * deviation + tiles.load(to_mean + at, exists))
        spread += weight * slope
    if direct is not None:
        sums -= tiles.load(direct + row * W + x, inside)
    at = plane // C * gradient_b + plane % C * gradient_c + y * gradient_y + x * gradient_x
    tiles.store(first + at, sums, inside)
    if second is not None:
        tiles.store(second + at, spread, inside)


# --- launchers -------------------------------------------------------------------------------------------------------------------


def mscn(image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> tuple[Tensor, Tensor]:
    """image (B, C, H, W) -> normalised, local_std, contiguous."""
    normalised, std = (image.new_empty(image.shape) for _ in range(2))
    if image.numel():
        call = _Call(image, window, sigma, c, replicate)
        call.statistics(call.row_statistics(), None, None, (normalised, std, None))
    return normalised, std


def mscn_backward(
    grad_normalised: Tensor | None,
    grad_std: Tensor | None,
    image: Tensor,
    window: int,
    sigma: float,
    c: float,
    replicate: bool,
) -> Tensor:
    """The gradient of the image, from that of either result or of both."""
    gradient = torch.empty_like(image)
    if image.numel():
        call = _Call(image, window, sigma, c, replicate)
        of_rows = call.row_statistics()
        to_mean, to_variance, means = kept = call.maps(3)
        upstream = [None if grad is None else grad.contiguous() for grad in (grad_normalised, grad_std)]
        call.statistics(of_rows, upstream[0], upstream[1], kept)
        offsets, _ = of_rows
        to_rows = call.maps(2)
        call.gather(offsets, means, (to_mean, to_variance), None, to_rows)
        call.gather(None, offsets, to_rows, to_mean, (gradient, None))
    return gradient


class _Call:
    """One image and the options that all its launches share."""

    def __init__(self, image: Tensor, window: int, sigma: float, c: float, replicate: bool) -> None:
        b, channels, h, w = image.shape
        self.image, self.c, self.window, self.replicate = image, c, window, replicate
        self.sizes = (channels, h, w, b * channels * h)
        self.grid = (triton.cdiv(b * channels * h, ROWS) * triton.cdiv(w, COLUMNS),)
        # Made on the device, because a copy from the host would wait for it.
        self.tables = image.new_empty((2, TAPS.value), dtype=torch.float32)
        _tables[(1,)](self.tables, window, -1 / (2 * sigma * sigma), TAPS, num_warps=1, **tiles.OPTIONS)

    def maps(self, count: int) -> tuple[Tensor, ...]:
        return self.image.new_empty((count, *self.image.shape), dtype=torch.float32).unbind()

    def row_statistics(self) -> tuple[Tensor, ...]:
        """The mean of each pixel's window along its row, relative to the pixel, and the variance."""
        offsets, variances = self.maps(2)
        self.statistics((None, None), None, None, (offsets, variances, None))
        return offsets, variances

    def statistics(
        self,
        of_rows: tuple[Tensor | None, ...],
        grad_normalised: Tensor | None,
        grad_std: Tensor | None,
        results: tuple[Tensor | None, ...],
    ) -> None:
        _statistics[self.grid](
            self.image,
            self.tables,
            *of_rows,
            grad_normalised,
            grad_std,
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

    def gather(
        self,
        offsets: Tensor | None,
        means: Tensor,
        slopes: tuple[Tensor, ...],
        direct: Tensor | None,
        results: tuple[Tensor | None, ...],
    ) -> None:
        assert results[0] is not None
        _gather[self.grid](
            self.image,
            self.tables,
            offsets,
            means,
            *slopes,
            direct,
            *results,
            *self.sizes,
            *self.image.stride(),
            *results[0].stride(),
            self.window,
            self.replicate,
            ROWS,
            COLUMNS,
            TAPS,
            num_warps=4,
            **tiles.OPTIONS,
        )
