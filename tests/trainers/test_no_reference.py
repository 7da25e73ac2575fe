"""trainers.no_reference: BRISQUE's machine against OpenCV's, and that both scores rise with what makes a picture worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainers.test_restore import weights
from tests.trainers.tiny import write_images
from trainers.cli import main
from trainers.data.images import read_image, to_float
from trainers.errors import InputError
from trainers.no_reference import NoReference, read_brisque

MODEL = "weights/opencv_contrib__brisque_model_live.yml"


def photograph(shared_data: Path) -> Tensor:
    return to_float(read_image(shared_data / "set5" / "HR" / "baby.png"))


def worse(image: Tensor) -> list[Tensor]:
    """The image with noise, and in coarse pixels."""
    noisy = image + 25 / 255 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    coarse = image[:, ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    return [noisy, coarse]


def test_scores_rise_with_damage(shared_data: Path) -> None:
    measure = NoReference(piqe=True, brisque=read_brisque(shared_data / MODEL))
    image = photograph(shared_data)
    clean = measure(image)
    assert 0 < clean["brisque"] < 40
    assert 0 <= clean["piqe"] < 50
    for damaged in worse(image):
        assert measure(damaged)["brisque"] > clean["brisque"] + 10
        assert measure(damaged)["piqe"] > clean["piqe"] + 5


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.0, 0.0), 16.995405), ((-1.0, 1.0), 77.383385), ((1.0, -1.0), 114.646667)],
)
def test_the_machine_is_that_of_opencv(shared_data: Path, ends: tuple[float, float], expected: float) -> None:
    """The values that cv2.ml.SVM_load(...).predict of OpenCV 4.14 gives for features that go from one end to the other."""
    brisque = read_brisque(shared_data / MODEL)
    least, most = brisque.low, brisque.high
    x = torch.linspace(*ends, 36, dtype=torch.float64)
    assert brisque.judge((x + 1) / 2 * (most - least) + least) == pytest.approx(expected, abs=2e-3)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.yml: cannot be read"):
        read_brisque(tmp_path / "model.yml")
    for name in ("model.yml", "range.yml"):
        (tmp_path / name).write_text("%YAML:1.0\n---\nrange: 1\n")
    with pytest.raises(InputError, match="must hold OpenCV"):
        read_brisque(tmp_path / "model.yml")
    (tmp_path / "model.yml").write_text("[")
    with pytest.raises(InputError, match=r"model\.yml: is no YAML"):
        read_brisque(tmp_path / "model.yml")


@pytest.mark.usefixtures("one_thread")
def test_eval_shows_them(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, images = weights(tmp_path, scale=2), write_images(tmp_path / "in", 1, (64, 64))
    command = ["eval", str(source), "--data", str(images), "--piqe", "--brisque", str(shared_data / MODEL)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sets"]["in"]["network"]
    assert set(found) == {"psnr", "ssim", "piqe", "brisque", "per_image"}
    assert found["piqe"] == found["per_image"]["image0"]["piqe"]
    assert main(command) == 0
    assert "PIQE" in capsys.readouterr().out
