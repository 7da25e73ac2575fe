"""trainers.check: what only the whole run shows is found before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.trainers.tiny import tiny, write_yaml
from trainers.check import check
from trainers.cli import main
from trainers.models import find

pytestmark = pytest.mark.usefixtures("one_thread")

CODEC = {"name": "codec", "weights": "teacher.safetensors"}


def same_size(folder: Path, method: dict[str, Any]) -> Path:
    """A config of denoising whose teacher, a NAFNet, has weights of its own."""
    from tests.trainers.test_restore import weights

    weights(folder, "nafnet")
    network = {"arch": "nafnet", "width": 4, "middle_blocks": 1}
    tree = tiny(folder) | {"task": "denoise", "method": method, "student": network}
    return write_yaml(folder, tree | {"teacher": network | {"weights": "nafnet.safetensors"}})


@pytest.mark.parametrize("content", [b"", b"words", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_damaged(tmp_path: Path, role: str, content: bytes) -> None:
    (tmp_path / "broken.safetensors").write_bytes(content)
    problems = check(write_yaml(tmp_path, tiny(tmp_path, "output")), [f"{role}.weights=broken.safetensors"])[0]
    assert len(problems) == 1
    assert problems[0].startswith(f"{role}.weights: {tmp_path}/broken.safetensors: cannot be read as weights")


def test_a_grey_teacher_of_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its size is not asked about with images that it does not take."""
    entry = find("dncnn")
    save_file(entry.build(entry.options(image_channels=1)).state_dict(), tmp_path / "grey.safetensors")
    student = {"arch": "nafnet", "width": 4, "middle_blocks": 1}
    tree = tiny(tmp_path, "output") | {
        "task": "denoise",
        "student": student,
        "teacher": {"weights": "grey.safetensors"},
    }
    config = write_yaml(tmp_path, tree)
    [problem] = check(config)[0]
    assert "data.grey: the teacher sees grey images" in problem
    assert main(["train", str(config)]) == 2
    assert "the teacher sees grey images" in capsys.readouterr().err


def test_an_exclude_that_leaves_nothing(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, tiny(tmp_path))
    [problem] = check(config, ["data.train={gt: train, exclude: [image0, image1, image2]}"])[0]
    assert "exclude: leaves no image of" in problem


def test_a_seed_beyond_64_bits(tmp_path: Path) -> None:
    [problem] = check(write_yaml(tmp_path, tiny(tmp_path)), [f"train.seed={10**20}"])[0]
    assert "train.seed" in problem


def test_weights_of_teacher_b(tmp_path: Path) -> None:
    config = same_size(tmp_path, {"name": "slkd", "clean_weights": "nosuch.pth"})
    assert check(config)[0] == [
        f"method.clean_weights: {tmp_path}/nosuch.pth: there are no weights: give a .safetensors or .pth file, or a checkpoint folder"
    ]
    assert check(config, ["method.clean_weights=nafnet.safetensors"])[0] == []


def test_taps_of_which_the_method_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = same_size(tmp_path, {"name": "slkd"})
    taps = ["teacher.taps={a: intro}", "student.taps={a: intro}"]
    [problem] = check(config, taps)[0]
    assert problem.startswith("teacher.taps: method slkd needs taps named enc... and dec..., but the teacher has a")
    assert main(["train", str(config), "--set", taps[0], "--set", taps[1]]) == 2
    assert problem in capsys.readouterr().err


def test_weights_of_the_feature_network(tmp_path: Path) -> None:
    tree = tiny(tmp_path, "csd")
    tree["method"]["features"] = CODEC
    [problem] = check(write_yaml(tmp_path, tree))[0]
    assert "method.features.weights" in problem
    assert "these are no such weights" in problem


def test_a_method_without_its_teacher_is_one_problem(tmp_path: Path) -> None:
    config = same_size(tmp_path, {"name": "slkd", "clean_weights": "nosuch.pth"})
    [problem] = check(config, ["teacher=null"])[0]
    assert "method slkd needs a teacher" in problem


def test_what_is_no_config_is_said_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny(tmp_path)
    tree["train"]["stepz"] = 3
    for path in (write_yaml(tmp_path, tree), tmp_path / "broken.yaml"):
        (tmp_path / "broken.yaml").write_text("train: [")
        [problem], notes = check(path)
        assert ("stepz: unknown key" if path.name == "scratch.yaml" else "broken.yaml") in problem
        assert notes == []
        assert main(["train", str(path)]) == 2
        assert problem in capsys.readouterr().err


def test_taps_are_checked_also_beside_weights_that_do_not_load(tmp_path: Path) -> None:
    overrides = ["teacher.weights=nosuch.pth", "teacher.taps={a: nowhere}"]
    weights, taps = check(write_yaml(tmp_path, tiny(tmp_path, "output")), overrides)[0]
    assert "nosuch.pth: there are no weights" in weights
    assert taps.startswith("teacher.taps: tap a: there is no module nowhere")
