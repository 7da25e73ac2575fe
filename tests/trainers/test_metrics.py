"""trainers.metrics: definitions against other implementations and closed forms. Golden values: test_evaluate.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.metrics import PROTOCOLS, psnr, rgb_to_y, ssim

SR_Y = PROTOCOLS["sr-y"]


def images(height: int = 20, width: int = 25, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(3, height, width, generator=generator)
    return (gt + 0.05 * torch.randn(gt.shape, generator=generator)).clamp(0, 1), gt


def test_y_of_known_colours() -> None:
    """Black, white and the primaries in MATLAB's rgb2ycbcr."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).float()
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64)
    torch.testing.assert_close(rgb_to_y(colours.T.unsqueeze(-1)).squeeze(), expected)


@given(height=st.integers(1, 6), width=st.integers(1, 6), lead=st.sampled_from([(), (2,), (2, 3)]))
def test_y_shape(height: int, width: int, lead: tuple[int, ...]) -> None:
    y = rgb_to_y(torch.rand(*lead, 3, height, width))
    assert y.shape == (*lead, 1, height, width)
    assert y.dtype == torch.float64


def test_psnr_closed_form() -> None:
    zeros = torch.zeros(1, 4, 4)
    assert psnr(zeros + 25.5, zeros).item() == pytest.approx(20.0)
    assert psnr(zeros, zeros).item() == math.inf


def test_ssim_equals_scikit_image_where_the_window_fits() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    restored, gt = (255 * image[0].double() for image in images())
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255.0}
    _, full = metrics.structural_similarity(restored.numpy(), gt.numpy(), full=True, **options)
    assert ssim(restored[None], gt[None]).item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-12)


def test_ssim_of_equal_and_of_constant_images() -> None:
    gt = 255 * images()[1]
    assert ssim(gt, gt).item() == pytest.approx(1)
    a, b, c1 = 100.0, 120.0, 2.55**2
    dark, light = torch.full((1, 11, 11), a), torch.full((1, 11, 11), b)
    assert ssim(dark, light).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_is_the_mean_over_channels() -> None:
    restored, gt = (255 * image for image in images())
    channels = torch.stack([ssim(restored[i : i + 1], gt[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(restored, gt), channels.mean())


def test_full_range_luma_is_1_32_db_lower() -> None:
    """The trap that named protocols are there for."""
    restored, gt = images()
    studio = psnr(rgb_to_y(restored), rgb_to_y(gt))
    full = psnr((rgb_to_y(restored) - 16) * 255 / 219, (rgb_to_y(gt) - 16) * 255 / 219)
    assert (studio - full).item() == pytest.approx(20 * math.log10(255 / 219))


def test_sr_y_in_numpy() -> None:
    """The protocol written out again: 8 bits, luma, border, error."""
    restored, gt = images()
    weights = np.array([65.481, 128.553, 24.966])
    lumas = []
    for image in (restored, gt):
        pixels = np.round(np.clip(image.numpy().astype(np.float64) * 255, 0, 255)) / 255
        lumas.append((16 + np.tensordot(weights, pixels, axes=1))[3:-3, 3:-3])
    expected = 10 * np.log10(255**2 / np.mean((lumas[0] - lumas[1]) ** 2))
    assert SR_Y.measure(restored, gt, 3)["psnr"] == pytest.approx(expected, abs=1e-9)


def test_sr_y_rounds_clips_and_leaves_the_border_out() -> None:
    gt = images()[1]
    gt8 = (gt * 255).round() / 255
    exact = SR_Y.measure(gt8, gt8, 2)
    assert exact == {"psnr": math.inf, "ssim": pytest.approx(1)}
    assert SR_Y.measure(gt8 + 0.4 / 255, gt8, 2)["psnr"] == math.inf
    white = torch.ones(3, 20, 20)
    assert SR_Y.measure(white + 0.3, white, 2)["psnr"] == math.inf
    framed = gt8.clone()
    framed[:, :2] = framed[:, -2:] = 0.0
    framed[..., :2] = framed[..., -2:] = 0.0
    assert SR_Y.measure(framed, gt8, 2) == exact
    assert SR_Y.measure(framed, gt8, 1)["psnr"] < 30


def test_derain_y_in_numpy() -> None:
    """8 bits, 8-bit luma, no border left out."""
    restored, gt = images()
    weights = np.array([65.481, 128.553, 24.966])
    pixels = (np.round(np.clip(image.numpy().astype(np.float64) * 255, 0, 255)) / 255 for image in (restored, gt))
    x, y = (np.round(16 + np.tensordot(weights, image, axes=1)) for image in pixels)
    measured = PROTOCOLS["derain-y"].measure(restored, gt, 1)
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((x - y) ** 2)), abs=1e-9)
    assert measured["ssim"] == pytest.approx(ssim(torch.from_numpy(x)[None], torch.from_numpy(y)[None]).item())


def test_rgb_and_grey_in_numpy() -> None:
    restored, gt = images()
    x, y = (np.round(np.clip(image.numpy().astype(np.float64) * 255, 0, 255)) for image in (restored, gt))
    colour = PROTOCOLS["denoise-rgb"].measure(restored, gt, 1)
    assert colour["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((x - y) ** 2)), abs=1e-9)
    assert colour["ssim"] == pytest.approx(ssim(torch.from_numpy(x), torch.from_numpy(y)).item())
    one_channel = PROTOCOLS["denoise-grey"].measure(restored[:1], gt[:1], 1)
    equal_channels = (image[:1].expand(3, -1, -1) for image in (restored, gt))
    assert PROTOCOLS["denoise-grey"].measure(*equal_channels, 1)["psnr"] == pytest.approx(one_channel["psnr"], abs=1e-9)
    with pytest.raises(ValueError, match="one RGB image"):
        PROTOCOLS["denoise-rgb"].measure(restored[:1], gt[:1], 1)
    assert one_channel["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((x[0] - y[0]) ** 2)), abs=1e-9)


def test_half_precision_images_are_measured_in_float64() -> None:
    restored, gt = images()
    half = restored.bfloat16()
    assert SR_Y.measure(half, gt, 2) == SR_Y.measure(half.double(), gt.double(), 2)


def test_describe_says_everything() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        for word in (name, "PSNR", "SSIM", "rounded", "border", "peak 255"):
            assert word in protocol.describe()


@pytest.mark.parametrize(
    ("restored", "gt", "error", "message"),
    [
        (torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(3, 20, 20), TypeError, "restored must be floating"),
        (torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20), ValueError, r"one RGB image .* \(1, 3, 20, 20\)"),
        (torch.zeros(3, 20, 20), torch.zeros(1, 20, 20), ValueError, "gt must be one RGB image"),
        (torch.zeros(3, 20, 20), torch.zeros(3, 20, 21), ValueError, "differ in size"),
        (torch.zeros(3, 14, 20), torch.zeros(3, 14, 20), ValueError, "at least 11 x 11"),
    ],
)
def test_bad_input(restored: Tensor, gt: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SR_Y.measure(restored, gt, 2)
