"""`kdtrain restore` and `kdtrain eval` on the tasks: folders and single pictures, tiles, self-ensemble, grey, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.trainers.tiny import write_images, write_tiny
from trainers.cli import main
from trainers.data.images import read_image, to_float, to_uint8
from trainers.metrics import PROTOCOLS
from trainers.models import find
from trainers.networks import network_of_weights
from trainers.pretrained import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder: Path, arch: str = "edsr", **options: Any) -> Path:
    """Of a tiny network, untrained."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"features": 4, "blocks": 1} if arch == "edsr" else {"width": 4, "middle_blocks": 1}
    entry = find(arch)
    path = folder / f"{arch}.safetensors"
    save_file(entry.build(entry.options(**{**small, **options})).state_dict(), path)
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_restore_writes_what_the_network_makes(tmp_path: Path) -> None:
    source, given = weights(tmp_path, scale=2), write_images(tmp_path / "in", 2, (21, 30))
    assert main(["restore", str(given), str(tmp_path / "out"), "--weights", str(source)]) == 0
    _, _, network = network_of_weights(read_weights(str(source)))
    for index in range(2):
        picture = to_float(read_image(given / f"image{index}.png"))
        with torch.no_grad():
            expected = to_uint8(network.eval()(picture[None])[0])
        assert torch.equal(read_image(tmp_path / "out" / f"image{index}.png"), expected)


def test_every_picture_that_cannot_be_restored_is_said_before_the_first_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, given = weights(tmp_path, scale=2), write_images(tmp_path / "in", 3)
    for name in ("image1", "image2"):
        (given / f"{name}.png").write_bytes(b"no picture")
    assert main(["restore", str(given), str(tmp_path / "out"), "--weights", str(source)]) == 2
    said = capsys.readouterr().err
    assert "image1.png" in said
    assert "image2.png" in said
    assert not (tmp_path / "out").exists()


def test_restore_one_picture_to_a_file_or_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, given = weights(tmp_path, scale=2), write_images(tmp_path / "in", 1) / "image0.png"
    for out, written in (("new/picture.PNG", "new/picture.PNG"), ("folder", "folder/image0.png")):
        assert main(["restore", str(given), str(tmp_path / out), "--weights", str(source)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / written}\n"
        assert read_image(tmp_path / written).shape == (3, 80, 96)


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, given, out = weights(tmp_path, scale=2), write_images(tmp_path / "in", 3), tmp_path / "out"
    out.mkdir()
    for name in ("image1.png", "image2.png", "keep.png"):
        (out / name).write_bytes(b"mine")
    assert main(["restore", str(given / "image0.png"), str(out / "keep.png"), "--weights", str(source)]) == 2
    assert f"{out / 'keep.png'} exists already: give another output" in capsys.readouterr().err
    assert main(["restore", str(given), str(out), "--weights", str(source)]) == 2
    assert f"{out / 'image1.png'} exists already, and 1 more" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(
        ("image1.png", "image2.png", "keep.png"), b"mine"
    )
    assert main(["restore", str(given / "image0.png"), str(out), "--weights", str(source)]) == 0


@pytest.mark.parametrize("arch", ["edsr", "nafnet"])
def test_tiles_and_ensemble(tmp_path: Path, arch: str) -> None:
    """Pictures of any size; a local network makes the same of tiles, but not of the ensemble."""
    source = weights(tmp_path, arch, **({"scale": 1} if arch == "edsr" else {}))
    given = write_images(tmp_path / "in", 1, (101, 77))
    pictures = {}
    for how in ([], ["--tile", "64"], ["--ensemble"], ["--tile", "64", "--ensemble"]):
        out = tmp_path / "out" / "".join(how)
        assert main(["restore", str(given), str(out), "--weights", str(source), *how]) == 0
        pictures["".join(how)] = read_image(out / "image0.png").int()
        assert pictures["".join(how)].shape == (3, 101, 77)
    if arch == "edsr":
        assert (pictures[""] - pictures["--tile64"]).abs().max() <= 1  # rounding may fall to the other side
        assert (pictures["--ensemble"] - pictures["--tile64--ensemble"]).abs().max() <= 1
    assert not torch.equal(pictures[""], pictures["--ensemble"])


def test_a_grey_network_makes_grey_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, given = weights(tmp_path, "nafnet", image_channels=1), write_images(tmp_path / "in", 1)
    assert main(["restore", str(given), str(tmp_path / "out"), "--weights", str(source)]) == 0
    picture = read_image(tmp_path / "out" / "image0.png")
    assert torch.equal(picture[0], picture[2])
    found = evaluated(capsys, source, "--task", "denoise", "--data", given)
    assert found["protocol"] == "denoise-grey"
    assert main(["eval", str(source), "--task", "denoise", "--data", str(given), "--protocol", "denoise-rgb"]) == 2
    assert "the network restores grey ones" in capsys.readouterr().err


def test_eval_of_a_denoising_run_is_that_of_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    overrides = ["task=denoise", "data.degradation={name: noise, sigma: 40}"]
    assert main(["train", str(config), *(part for text in overrides for part in ("--set", text))]) == 0
    run = tmp_path / "runs" / "scratch"
    result = json.loads((run / "result.json").read_text())
    found = evaluated(capsys, run, "--data", f"val={tmp_path / 'val'}")
    assert (found["task"], found["protocol"]) == ("denoise", "denoise-rgb")
    for who, name in (("network", "student"), ("input", "input")):
        measured, expected = found["sets"]["val"][who], result["sets"]["val"][name]
        assert measured["per_image"]["image0"] == pytest.approx(expected["per_image"]["image0"])
    assert found["sets"]["val"]["input"]["psnr"] == pytest.approx(20 * math.log10(255 / 40), abs=1.0)
    quieter = evaluated(capsys, run, "--data", f"val={tmp_path / 'val'}", "--degradation", "{name: noise, sigma: 10}")
    assert quieter["sets"]["val"]["input"]["psnr"] > found["sets"]["val"]["input"]["psnr"] + 10


def test_eval_of_a_run_is_its_own_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sets, with the degradations of their own, in its tiles; what is asked for comes before that."""
    noise, place = "{name: noise, sigma: 40}", write_images(tmp_path / "large", 1, (72, 80))
    sets = f"[{{name: loud, gt: {place}}}, {{name: soft, gt: {place}, degradation: {{name: noise, sigma: 5}}}}]"
    overrides = ["task=denoise", f"data.degradation={noise}", f"data.val={sets}", "val.tile=64"]
    config = write_tiny(tmp_path)
    assert main(["train", str(config), *(part for text in overrides for part in ("--set", text))]) == 0
    run = tmp_path / "runs" / "scratch"
    result = json.loads((run / "result.json").read_text())
    found = evaluated(capsys, run)
    assert found["tile"] == 64
    assert {name: made["sigma"] for name, made in found["degradations"].items()} == {"loud": 40, "soft": 5}
    for name in ("loud", "soft"):
        measured, expected = found["sets"][name]["network"], result["sets"][name]["student"]
        assert measured["per_image"]["image0"] == pytest.approx(expected["per_image"]["image0"])
    asked = evaluated(capsys, run, "--degradation", noise, "--tile", "0")
    assert asked["tile"] is None
    assert asked["sets"]["soft"]["input"] == asked["sets"]["loud"]["input"] == found["sets"]["loud"]["input"]
    assert main(["eval", str(run), "--lq", str(tmp_path)]) == 2
    assert "give the ground truths too, with --data" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["denoise", "derain", "deblur", "dehaze"])
def test_eval_of_single_images_for_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    source = weights(tmp_path, scale=1)
    gt, lq = (write_images(tmp_path / name, 1, seed=seed) / "image0.png" for seed, name in enumerate(("gt", "lq")))
    found = evaluated(capsys, source, "--task", task, "--data", gt, "--lq", lq)
    restored, truth = to_float(read_image(lq)), to_float(read_image(gt))
    assert found["protocol"].startswith(task)
    expected = PROTOCOLS[found["protocol"]].measure(restored, truth, 1)
    assert found["sets"]["image0"]["input"]["per_image"]["image0"] == pytest.approx(expected)


def test_eval_of_a_single_image_for_super_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, gt = weights(tmp_path, scale=2), write_images(tmp_path / "gt", 1) / "image0.png"
    found = evaluated(capsys, source, "--data", f"one={gt}", "--tile", "64", "--ensemble")
    small = evaluated(capsys, source, "--data", f"one={gt}", "--degradation", "{name: bicubic, border: replicate}")
    assert (found["task"], found["protocol"], found["baseline"]) == ("sr", "sr-y", "bicubic")
    assert found["sets"]["one"]["bicubic"] != small["sets"]["one"]["bicubic"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["restore", "in", "in", "--weights", "edsr.safetensors"], "would be overwritten"),
        (["restore", "nowhere", "out", "--weights", "edsr.safetensors"], "nowhere: no such folder"),
        (["restore", "in", "out", "--weights", "absent.pth"], "there are no weights"),
        (["restore", "in", "out", "--weights", "edsr.safetensors", "--tile", "30"], "--tile 30: overlap must be"),
        (["restore", "in", "out", "--weights", "nafnet.safetensors", "--tile", "72"], "must be multiples of 16"),
        (["eval", "edsr.safetensors", "--data", "in"], "do not tell what they restore: give --task sr, denoise"),
        (["eval", "edsr.safetensors", "--data", "in", "--task", "denose"], "there is no task denose"),
        (["eval", "edsr.safetensors", "--data", "in", "--task", "sr"], "--task sr is not for a network of scale 1"),
        (["eval", "edsr.safetensors", "--data", "in", "--task", "dehaze"], "makes no inputs by itself: give --lq"),
        (
            ["eval", "edsr.safetensors", "--data", "in", "--task", "denoise", "--degradation", "{name: fog}"],
            "known: bicubic, noise, rain",
        ),
        (["eval", "edsr.safetensors", "--data", "in/image0.png", "--task", "derain", "--lq", "in"], "is no file, but"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    weights(tmp_path, scale=1)
    weights(tmp_path, "nafnet")
    write_images(tmp_path / "in", 1)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
