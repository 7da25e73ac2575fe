"""Exports: the same network in other hands, and a card whose numbers are those of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.trainers.test_networks import SMALL
from tests.trainers.tiny import write_tiny
from trainers import export
from trainers.cli import main
from trainers.config_file import load_config
from trainers.launch import train
from trainers.models import MODELS
from trainers.sources import open_source


def write_weights(folder: Path, arch: str) -> Path:
    torch.manual_seed(0)
    entry = MODELS[arch]
    path = folder / f"{arch}.safetensors"
    save_file(entry.build(entry.options(**SMALL[arch])).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(load_config(write_tiny(tmp_path_factory.mktemp("export"))))


def test_the_exported_weights_are_the_students(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "-o", str(out), "--size", "16x24"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "model.safetensors"), str(out / "README.md")]
    before, after = open_source(run).network, open_source(out / "model.safetensors").network
    image = torch.rand(1, 3, 9, 7)
    assert torch.equal(before(image), after(image))


def test_the_card_repeats_the_result(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--size", "16x24"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    score = result["sets"]["val"]["student"]
    assert f"| val | student | {score['psnr']:.3f} | {score['ssim']:.4f} |" in card
    assert f"Protocol `{result['protocol']}`: " in card
    assert f"{result['protocol']}: " not in card  # once, and not in its text again
    assert "one 16 x 24 input" in card
    assert f"| {result['student']['params']:,} |" in card


def test_an_export_that_fails_leaves_nothing_in_the_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as failing:
        failing.setattr(export, "find_spec", lambda name: None)
        assert main(["export", str(run), "-o", str(out), "--onnx"]) == 2
        assert "--onnx needs onnxruntime" in capsys.readouterr().err
        failing.setattr(export, "measure", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert main(["export", str(run), "-o", str(out)]) == 3
    assert list(out.iterdir()) == []
    assert main(["export", str(run), "-o", str(out), "--size", "16x24"]) == 0


def test_an_export_is_never_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(run), "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "arch", ["edsr", *(pytest.param(arch, marks=pytest.mark.slow) for arch in MODELS if arch != "edsr")]
)
def test_onnx_gives_the_same_image_at_any_size(tmp_path: Path, arch: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs kdops[onnx]")
    weights = write_weights(tmp_path, arch)
    assert main(["export", str(weights), "-o", str(tmp_path / "out"), "--onnx", "--size", "64x64"]) == 0
    source = open_source(weights)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    # A batch and sizes that the export itself has not compared.
    image = torch.rand(2, source.entry.image_channels(source.options), 160, 80)
    (restored,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(restored), source.network(image), rtol=0, atol=1e-4)
    assert "model.onnx differs from torch by at most" in (tmp_path / "out" / "README.md").read_text()


def test_a_difference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="needs kdops[onnx]")
    monkeypatch.setattr("trainers.export.TOLERANCE", -1.0)
    weights = write_weights(tmp_path, "edsr")
    assert main(["export", str(weights), "-o", str(tmp_path / "out"), "--onnx"]) == 2
    assert "ONNX Runtime differs from torch by" in capsys.readouterr().err


def test_sizes_are_height_x_width(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), "--size", "256"])
    assert "give height and width, such as 256x256" in capsys.readouterr().err
