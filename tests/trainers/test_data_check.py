"""`kdtrain data check` on folders as downloads have them, whole and broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from trainers.cli import main
from trainers.config import Data
from trainers.data.images import write_png
from trainers.data_check import NOTES, PROBLEMS, Checked, check_data
from trainers.errors import InputError

SHARED = Path(__file__).parents[2] / "../shared/data"


def images(folder: Path, names: str, size: tuple[int, int] = (24, 32)) -> None:
    for name in names.split():
        write_png(folder / f"{name}.png", torch.full((3, *size), 0.5))


def found(part: Checked) -> dict[str, int]:
    return {kind: len(texts) for kind, texts in part.found.items() if texts}


def pairings(checked: list[Checked], root: Path) -> dict[str, tuple[str | None, int, int | None, str]]:
    """Input folder (or that of images alone) -> ground truths, pairs, scale, template."""
    relative = [
        (None if part.gt is None else str(part.gt.relative_to(root)), part.lq or part.gt, part) for part in checked
    ]
    return {
        str(path.relative_to(root)): (gt, len(part.pairs), part.scale, part.template)
        for gt, path, part in relative
        if path
    }


def test_nested_scenes_as_gopro_has_them(tmp_path: Path) -> None:
    for scene in ("train/GOPR1", "train/GOPR2", "test/GOPR1"):
        for kind in ("blur", "blur_gamma", "sharp"):
            images(tmp_path / scene / kind, "000001 000002")
    checked = check_data([tmp_path], patch=16)
    assert not any(part.faulty for part in checked)
    assert pairings(checked, tmp_path) == {
        f"{scene}/{kind}": (f"{scene}/sharp", 2, 1, "{}")
        for scene in ("train/GOPR1", "train/GOPR2", "test/GOPR1")
        for kind in ("blur", "blur_gamma")
    }


def test_scales_as_div2k_has_them(tmp_path: Path) -> None:
    images(tmp_path / "DIV2K_train_HR", "0001 0002", (24, 31))
    images(tmp_path / "DIV2K_valid_HR", "0801")
    images(tmp_path / "DIV2K_train_LR_bicubic/X2", "0001x2 0002x2", (12, 15))
    images(tmp_path / "DIV2K_train_LR_bicubic/X4", "0001x4 0002x4", (6, 7))
    checked = check_data([tmp_path], patch=16)
    assert pairings(checked, tmp_path) == {
        "DIV2K_train_LR_bicubic/X2": ("DIV2K_train_HR", 2, 2, "{}x2"),
        "DIV2K_train_LR_bicubic/X4": ("DIV2K_train_HR", 2, 4, "{}x4"),
        "DIV2K_valid_HR": ("DIV2K_valid_HR", 1, None, "{}"),
    }
    assert [found(part) for part in checked] == [{"modcrop": 2}, {"modcrop": 2}, {}]


def test_several_inputs_of_a_ground_truth_as_reside_has_them(tmp_path: Path) -> None:
    images(tmp_path / "clear", "1 12")
    images(tmp_path / "hazy/part1", "1_1_0.9 1_2_0.8 12_1_0.7")
    (part,) = check_data([tmp_path], patch=16)
    assert pairings([part], tmp_path) == {"hazy/part1": ("clear", 3, 1, "{}_*")}
    assert found(part) == {"N:1": 1}
    assert not part.faulty


def test_two_paths_are_the_two_folders(tmp_path: Path) -> None:
    images(tmp_path / "input", "a b")
    images(tmp_path / "target", "a b")
    images(tmp_path / "elsewhere", "c")
    (part,) = check_data([tmp_path / "target", tmp_path / "input"], patch=16)
    assert pairings([part], tmp_path) == {"input": ("target", 2, 1, "{}")}


def test_everything_wrong_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "target", "a b c small cut lonely broken")
    images(tmp_path / "input", "a b c cut orphan broken")
    images(tmp_path / "input", "b", (12, 16))
    images(tmp_path / "target", "small", (8, 32))
    images(tmp_path / "input", "small", (8, 32))
    png = tmp_path / "target/cut.png"
    png.write_bytes(png.read_bytes()[:-40])
    (tmp_path / "input/broken.png").write_text("no image")
    images(tmp_path / "input/sub", "a")
    (tmp_path / "input/sub/a.png").rename(tmp_path / "input/a.jpg")
    (tmp_path / "input/sub").rmdir()
    (part,) = check_data([tmp_path], patch=16)
    assert found(part) == {"unpaired": 2, "wrong scale": 1, "corrupt": 2, "too small": 1, "names": 1}
    assert main(["data", "check", str(tmp_path), "--patch", "16"]) == 2
    said = capsys.readouterr().out
    for text in ("lonely.png: has no input", "orphan.png: belongs to no ground", "wrong scale: ", "b.png: 16x12"):
        assert text in said
    assert "data.train" not in said
    rows = [line.strip("│").split("│") for line in said.splitlines() if line.startswith("│")]
    cells = [
        " ".join(" ".join(column).split()) for column in zip(*rows, strict=True)
    ]  # in the 80 columns that a pipe has
    assert cells == ["target", "input", "6", "x1", "2 unpaired, 1 wrong scale, 2 corrupt, 1 too small, 1 names"]


def test_ground_truths_and_inputs_in_one_folder(tmp_path: Path) -> None:
    images(tmp_path / "scenes", "001_GT_SRGB 001_NOISY_SRGB")
    (part,) = check_data([tmp_path], patch=16)
    assert found(part) == {"names": 1}


def test_inputs_alone_are_unpaired(tmp_path: Path) -> None:
    images(tmp_path / "input", "a b")
    (part,) = check_data([tmp_path], patch=16)
    assert found(part) == {"unpaired": 2}


def test_brackets_in_names_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "photos[copy]", "a")
    assert main(["data", "check", str(tmp_path / "photos[copy]"), "--patch", "16"]) == 0
    assert "photos[copy]" in capsys.readouterr().out.split("data.train for")[0]


def test_what_it_prints_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last lines are data.train of a config."""
    images(tmp_path / "odd: 'name'/target", "1 2")
    images(tmp_path / "odd: 'name'/hazy", "1_a 2_a")
    assert main(["data", "check", str(tmp_path), "--patch", "16"]) == 0
    lines = capsys.readouterr().out.split("data.train for hazy, scale 1:\n")[1]
    data = Data.model_validate({"train": yaml.safe_load(lines)})
    (folders,) = data.train_folders
    assert folders.gt == str(tmp_path / "odd: 'name'/target")
    assert folders.lq == str(tmp_path / "odd: 'name'/hazy")
    assert folders.lq_template == "{}_*"


def test_no_images_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in it or below it"):
        check_data([tmp_path], patch=16)
    with pytest.raises(InputError, match="no such folder"):
        check_data([tmp_path, tmp_path / "absent"], patch=16)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_downloads() -> None:
    names = ("set5", "rain100H", "levin")
    checked = check_data([SHARED / name for name in names], patch=96)
    root = SHARED.resolve()
    assert pairings(checked, root) == {
        "set5/LR_bicubic/X2": ("set5/HR", 5, 2, "{}x2"),
        "set5/LR_bicubic/X3": ("set5/HR", 5, 3, "{}x3"),
        "set5/LR_bicubic/X4": ("set5/HR", 5, 4, "{}x4"),
        "set5/LR_bicubic/X8": ("set5/HR", 5, 8, "{}x8"),
        "rain100H/input": ("rain100H/target", 12, 1, "{}"),
        "levin": ("levin/gt", 32, 1, "{}_*"),  # four images with eight kernels; the kernels lie among the ground truths
    }
    kinds = {str(part.lq): found(part) for part in checked if part.faulty}
    assert kinds == {str(root / "levin"): {"unpaired": 8, "N:1": 4}}
    assert set(PROBLEMS) | set(NOTES) >= {kind for part in checked for kind in part.found}
