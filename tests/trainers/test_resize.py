"""trainers.data.resize: bit for bit MATLAB's imresize on the shipped LR images, and the properties of a resize."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.data.images import read_image, to_uint8
from trainers.data.resize import Border, imresize


def hr_and_lr(shared_data: Path, dataset: str, scale: int) -> list[tuple[Tensor, Tensor]]:
    """The ground truths, cropped to a multiple of the scale, and their shipped bicubic LR images."""
    pairs = []
    for path in sorted((shared_data / dataset / "HR").iterdir()):
        lr = read_image(next((shared_data / dataset / "LR_bicubic" / f"X{scale}").glob(f"{path.stem}x{scale}.*")))
        height, width = (scale * size for size in lr.shape[1:])
        pairs.append((read_image(path)[:, :height, :width], lr))
    assert pairs
    return pairs


@pytest.mark.parametrize(
    ("dataset", "scale", "border"),
    [(name, scale, border) for name, border in (("set5", "symmetric"), ("set14", "replicate")) for scale in (2, 3, 4)]
    + [("b100", 4, "replicate")],
)
def test_shipped_lr_bit_for_bit(shared_data: Path, dataset: str, scale: int, border: Border) -> None:
    for hr, lr in hr_and_lr(shared_data, dataset, scale):
        assert torch.equal(imresize(hr, 1 / scale, border=border), lr)


def test_set5_x8_was_rounded_once(shared_data: Path) -> None:
    """Set5's x8 was not made like its x2, x3 and x4: it was resized in floating point and rounded at the end."""
    for hr, lr in hr_and_lr(shared_data, "set5", 8):
        assert torch.equal(to_uint8(imresize(hr.double() / 255, 1 / 8)), lr)


sizes = st.integers(1, 20)
scales = st.sampled_from([1 / 8, 1 / 4, 1 / 3, 0.3, 1 / 2, 0.77, 1.0, 1.5, 2.0, 3.0, 4.0])
borders = st.sampled_from(["symmetric", "replicate"])


@given(height=sizes, width=sizes, scale=scales, border=borders, lead=st.sampled_from([(), (1,), (3,), (2, 3)]))
def test_shape_and_constant_image(height: int, width: int, scale: float, border: Border, lead: tuple[int, ...]) -> None:
    image = torch.full((*lead, height, width), 0.3, dtype=torch.float64)
    resized = imresize(image, scale, border=border)
    assert resized.shape == (*lead, math.ceil(height * scale), math.ceil(width * scale))
    torch.testing.assert_close(resized, torch.full_like(resized, 0.3))


@given(height=sizes, width=sizes, scale=scales, border=borders)
def test_equals_weight_matrices(height: int, width: int, scale: float, border: Border) -> None:
    """R X C^T: the matrix of an axis is the resize of the identity."""
    image = torch.rand(height, width, dtype=torch.float64)
    rows = imresize_columns_of_identity(height, scale, border)
    columns = imresize_columns_of_identity(width, scale, border)
    torch.testing.assert_close(imresize(image, scale, border=border), rows @ image @ columns.T)


def imresize_columns_of_identity(size: int, scale: float, border: Border) -> Tensor:
    """(size', size). The other axis is one pixel wide, whose resize is constant: any of its columns will do."""
    units = torch.eye(size, dtype=torch.float64)[:, :, None]  # (size, size, 1)
    return imresize(units, scale, border=border)[:, :, 0].T


def test_scale_one_is_the_identity() -> None:
    image = torch.rand(3, 7, 5)
    assert torch.equal(imresize(image, 1.0), image)


def test_every_axis_length_that_a_factor_divides() -> None:
    """49 * (1/49) is above 1 in floating point; the output still has one pixel."""
    for factor in range(2, 64):
        assert imresize(torch.rand(3 * factor, factor), 1 / factor).shape == (3, 1)


@given(scale=scales, border=borders)
def test_uint8_arithmetic_is_the_same_for_uint8_and_float_images(scale: float, border: Border) -> None:
    image = torch.randint(0, 256, (3, 13, 11), dtype=torch.uint8)
    expected = imresize(image, scale, border=border)
    assert expected.dtype == torch.uint8
    resized = imresize(image.float() / 255, scale, border=border, uint8=True)
    assert resized.dtype == torch.float32
    assert torch.equal(to_uint8(resized), expected)
    torch.testing.assert_close(resized, expected.float() / 255)


# Keys' kernel, stretched and lowered by 2, at the distances 0.5, 1.5, 2.5 and 3.5 of halved rows.
HALVED = [111 / 256, 29 / 256, -9 / 256, -3 / 256]


def test_halving_has_the_weights_of_keys_kernel() -> None:
    row = torch.zeros(16, 1, dtype=torch.float64)
    row[8] = 1.0  # output i lies at 2 i + 0.5
    expected = [0.0, 0.0, HALVED[3], HALVED[1], HALVED[0], HALVED[2], 0.0, 0.0]
    torch.testing.assert_close(imresize(row, 0.5).flatten().tolist(), expected)
    whole = imresize((128 * row).to(torch.uint8), 0.5).flatten().tolist()
    assert whole == [0, 0, 0, 15, 56, 0, 0, 0]  # 14.5 and 55.5 are rounded up


@pytest.mark.parametrize(("border", "place"), [("symmetric", 2), ("replicate", 0)])
def test_what_lies_beyond_the_border(border: Border, place: int) -> None:
    """The first output looks 3 pixels beyond: at the third mirrored, or at the first three times more."""
    row = torch.zeros(16, 1, dtype=torch.float64)
    row[place] = 1.0
    expected = HALVED[1] + HALVED[3] if place else HALVED[0] + sum(HALVED[1:])
    assert imresize(row, 0.5, border=border)[0].item() == pytest.approx(expected)


def test_rows_are_rounded_before_columns() -> None:
    image = torch.randint(0, 256, (12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def rows(pixels: Tensor) -> Tensor:
        return torch.cat([imresize(column, 0.5) for column in pixels.split(1, dim=1)], dim=1)

    assert torch.equal(imresize(image, 0.5), rows(rows(image).T).T)
    assert not torch.equal(imresize(image, 0.5), rows(rows(image.T).T))


def test_uint16_has_a_range_of_its_own() -> None:
    edge = torch.zeros(8, 8, dtype=torch.uint16)
    edge[:, 4:] = 65535
    resized = imresize(edge, 2.0)
    assert resized.dtype == torch.uint16
    exact = imresize(edge.double(), 2.0).clamp(0, 65535)
    assert (resized.double() - exact).abs().max() <= 0.5
    assert exact.frac().any()  # so that rounding is seen


def test_float_overshoots_and_uint8_clips() -> None:
    edge = torch.zeros(1, 8, 8)
    edge[..., 4:] = 1.0
    resized = imresize(edge, 2.0)
    assert resized.min() < -0.01
    assert resized.max() > 1.01
    clipped = imresize(edge, 2.0, uint8=True)
    assert (clipped.min(), clipped.max()) == (0, 1)


def test_any_strides_and_gradients() -> None:
    image = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    expected = imresize(image, 0.5)
    assert torch.equal(imresize(image.contiguous(memory_format=torch.channels_last), 0.5), expected)
    assert torch.equal(imresize(image.transpose(-1, -2).contiguous().transpose(-1, -2), 0.5), expected)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 0.5), image[:1, :1].clone().requires_grad_())


def test_gradients_after_a_call_in_inference_mode() -> None:
    """Weights are cached: those made in inference mode must serve autograd too."""
    image = torch.rand(1, 29, 31)
    with torch.inference_mode():
        imresize(image, 0.5)
    image.requires_grad_()
    imresize(image, 0.5).sum().backward()
    torch.testing.assert_close(image.grad.sum(), torch.tensor(15.0 * 16))


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bits() -> None:
    image = torch.rand(2, 3, 17, 23)
    assert torch.equal(imresize(image.cuda(), 0.5).cpu(), imresize(image, 0.5))


@pytest.mark.parametrize(
    ("image", "arguments", "error", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int64), {"scale": 2.0}, TypeError, "torch.int64"),
        (torch.zeros(4), {"scale": 2.0}, ValueError, r"shape \(4,\)"),
        (torch.zeros(3, 0, 4), {"scale": 2.0}, ValueError, "at least one pixel"),
        (torch.zeros(4, 4), {"scale": 0.0}, ValueError, "positive"),
        (torch.zeros(4, 4), {"scale": math.inf}, ValueError, "finite"),
        (torch.zeros(4, 4), {"scale": 2.0, "border": "zeros"}, ValueError, "'zeros'"),
    ],
)
def test_bad_input(image: Tensor, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        imresize(image, **arguments)  # type: ignore[arg-type]  # wrong types are the point
