"""trainers.brisque: scores of real photographs, which get worse with noise, blur and compression."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import kdops
from trainers.brisque import Brisque
from trainers.data.resize import imresize

PHOTOGRAPHS = ("set14/HR/lenna.png", "b100/HR/img_005.png", "b100/HR/img_010.png", "set5/HR/butterfly.png")


@pytest.fixture(scope="module")
def brisque(shared_data: Path) -> Brisque:
    files = (shared_data / f"weights/opencv_contrib__brisque_{name}_live.yml" for name in ("model", "range"))
    return Brisque.load(*files)


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[Tensor]:
    images = [np.array(Image.open(shared_data / name).convert("RGB")) for name in PHOTOGRAPHS]
    return [torch.from_numpy(image).permute(2, 0, 1).double() / 255 for image in images]


def noisy(image: Tensor, sigma: float) -> Tensor:
    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=image.dtype)
    return (image + sigma / 255 * drawn).clamp(0, 1)


def blurred(image: Tensor, factor: float) -> Tensor:
    """Halved so many times, and enlarged again."""
    return imresize(imresize(image, 1 / factor), factor)[:, : image.shape[1], : image.shape[2]].clamp(0, 1)


def compressed(image: Tensor, quality: float) -> Tensor:
    file = io.BytesIO()
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).double() / 255


def piqe(image: Tensor) -> float:
    luma = (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)
    return kdops.piqe(luma[None, None])[0].item()


LEVELS = {
    "noise": (noisy, (5, 15, 30, 50)),
    "blur": (blurred, (1.5, 2, 4, 8)),
    "jpeg": (compressed, (80, 50, 30, 15, 7)),
}


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("metric", ["brisque", "piqe"])
def test_growing_degradations_have_growing_scores(
    brisque: Brisque, photographs: list[Tensor], kind: str, metric: str
) -> None:
    degrade, levels = LEVELS[kind]
    judge: Callable[[Tensor], float] = brisque if metric == "brisque" else piqe
    means = [sum(judge(degrade(image, level)) for image in photographs) / len(photographs) for level in levels]
    assert means == sorted(means)
    assert means[-1] - means[0] > 20


def test_natural_photographs_score_low(brisque: Brisque, photographs: list[Tensor]) -> None:
    assert all(-20 < brisque(image) < 30 for image in photographs)


def test_the_machine_is_its_formula(brisque: Brisque) -> None:
    """On one of its own vectors, summed by hand; 774 vectors, rho -149.635, gamma 0.05 as the file says."""
    assert (len(brisque.vectors), brisque.gamma) == (774, 0.05)
    assert brisque.rho == pytest.approx(-149.635, abs=1e-3)
    vector = brisque.vectors[3]
    features = brisque.low + (vector + 1) / 2 * (brisque.high - brisque.low)
    expected = -brisque.rho
    for weight, other in zip(brisque.weights.tolist(), brisque.vectors, strict=True):
        expected += weight * float(torch.exp(-0.05 * (vector - other).square().sum()))
    assert brisque.judge(features) == pytest.approx(expected, abs=1e-6)


def test_grey_images_and_bad_ones(brisque: Brisque, photographs: list[Tensor]) -> None:
    luma = (photographs[0] * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(dim=0, keepdim=True)
    assert brisque(luma) == pytest.approx(brisque(luma.expand(3, -1, -1)), abs=1e-6)
    with pytest.raises(ValueError, match="shape"):
        brisque(photographs[0][None])
    with pytest.raises(TypeError, match="255"):
        brisque(photographs[0].byte())


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "other.yml").write_text("%YAML:1.0\n---\nname: other\n")
    with pytest.raises(ValueError, match="support-vector machine"):
        Brisque.load(tmp_path / "other.yml", tmp_path / "other.yml")
