"""The commands, as a user calls them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.tiny import STUDENT, TEACHER, tiny, write_images, write_tiny, write_yaml
from trainers import cli, compare
from trainers.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_help_is_instant() -> None:
    """It imports neither torch nor anything else that is heavy."""
    code = "import sys; from trainers.cli import parser; parser(); print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_nothing_imports_torchvision() -> None:
    code = "import sys, trainers.launch, trainers.compare, trainers.measure, trainers.check; print('torchvision' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_init_check_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--method", "scratch"]) == 0
    assert main(["init", "--method", "scratch"]) == 2  # never over an existing file
    assert "exists already" in capsys.readouterr().err
    images = [f"data.train={{gt: {write_images(tmp_path / 'train', 2, (64, 64))}}}"]
    images += [f"data.val=[{{name: val, gt: {write_images(tmp_path / 'val', 1, (64, 64))}}}]"]
    small = [*images, "train.steps=2", "data.batch=2", "student.blocks=1"]
    overrides = [part for text in small for part in ("--set", text)]
    assert main(["check", "run.yaml", *overrides]) == 0
    assert main(["train", "run.yaml", *overrides]) == 0
    assert (tmp_path / "runs" / "scratch-edsr-x2" / "report.html").is_file()


def test_init_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--schema"]) == 0
    assert "method" in json.loads(capsys.readouterr().out)["properties"]


def test_init_knows_its_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "x.yaml"), "--method", "fcad"]) == 2
    assert "facd" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "x.yaml"), "--task", "derian"]) == 2
    assert "derain" in capsys.readouterr().err


def test_init_check_train_for_a_task_that_keeps_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--method", "scratch", "--task", "derain"]) == 0
    small = [f"data.train={{gt: {write_images(tmp_path / 'train', 2, (64, 64))}}}", "train.steps=1", "data.batch=1"]
    small += [f"data.val=[{{name: val, gt: {write_images(tmp_path / 'val', 1, (40, 48))}}}]", "student.width=4"]
    overrides = [part for text in small for part in ("--set", text)]
    assert main(["check", "run.yaml", *overrides]) == 0
    assert main(["train", "run.yaml", *overrides]) == 0
    result = json.loads((tmp_path / "runs" / "scratch-nafnet-derain" / "result.json").read_text())
    assert result["protocol"] == "derain-y"
    assert set(result["sets"]["val"]) == {"input", "student"}


def test_check_finds_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny(tmp_path, "facd")
    (tmp_path / "train" / "broken.png").write_bytes(b"no image")
    write_images(tmp_path / "small", 1, (8, 40))
    (tmp_path / "small" / "image0.png").rename(tmp_path / "train" / "narrow.png")
    tree["data"]["val"].append({"name": "absent", "gt": "nowhere"})
    tree["data"]["val"].append({"name": "unpaired", "gt": "val", "lq": "train", "lq_template": "{}x2"})
    tree["student"] = STUDENT | {"taps": {"t1": "body.00", "t2": "body.1", "t3": "body.3"}}
    tree["teacher"] = TEACHER | {"weights": "elsewhere.pth"}
    tree["train"]["stepz"] = 3
    assert main(["check", str(write_yaml(tmp_path, tree))]) == 2
    said = capsys.readouterr().err
    for expected in (
        "train.stepz: unknown key; did you mean steps?",
        "broken.png: cannot be read as an image",
        "narrow.png: 40x8 is smaller than",
        "nowhere",
        "has no input image0x2",
        "student.taps: tap t1: there is no module body.00; nearest: body.0",
        "teacher.weights: {folder}/elsewhere.pth: there are no weights",
    ):
        assert expected.format(folder=tmp_path) in said
    assert f"{len(said.splitlines()) - 1} problems" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"features": 8}, "has features 6, but the config says features 8"),
        ({"weights": "train/image0.png"}, "cannot be read as weights"),
        ({"weights": "builtin:nothing"}, "no weights called nothing"),
        ({"taps": {"t1": "body.0", "t2": "tail.0"}}, "give both the same names"),
        ({"taps": {"t1": "body.0", "t2": "body.1", "t3": "tail.0"}}, "tap both where height and width agree"),
    ],
)
def test_check_of_the_teacher(
    tmp_path: Path, network: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny(tmp_path, "facd")
    tree["teacher"] |= network
    config = write_yaml(tmp_path, tree)
    assert main(["check", str(config)]) == 2
    assert said in capsys.readouterr().err
    assert main(["train", str(config)]) == 2  # and training does not start
    assert not (tmp_path / "runs").exists()


def test_train_fails_with_code_2_for_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    assert main(["train", str(config), "--set", "data.patch=64"]) == 2
    assert "is smaller than" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "scratch").exists()
    assert main(["train", str(config)]) == 0  # what failed left no run behind


def test_eval_of_a_run_a_checkpoint_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    run = tmp_path / "runs" / "scratch"
    result = json.loads((run / "result.json").read_text())
    last = run / "checkpoints" / "step-000004"
    capsys.readouterr()
    for source in (run, last, last / "ema.safetensors"):
        assert main(["eval", str(source), "--data", f"val={tmp_path / 'val'}", "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        for who, name in (("network", "student"), ("bicubic", "bicubic")):
            found, expected = measured["sets"]["val"][who], result["sets"]["val"][name]
            assert found["per_image"]["image0"] == pytest.approx(expected["per_image"]["image0"])
    assert main(["eval", str(run), "--data", str(tmp_path / "val")]) == 0
    assert "sr-y" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "absent"], "there are no weights"),
        (["eval", "weights.pth", "--data", "x=absent"], "there is no folder or image absent"),
        (["eval", "weights.pth", "--protocol", "mine"], "there is no protocol mine"),
        (["eval", "other.pth"], "fit none of our networks"),
        (["compare", "absent", "also-absent"], "no run folder"),
        (["compare"], "give either run folders, or --recipe and --methods"),
        (
            ["compare", "runs/a", "runs/b", "--seeds", "1"],
            "--seeds and --set are for runs that are trained with --recipe",
        ),
        (["compare", "runs/a", "runs/b", "--set", "train.lr=3"], "leave them out beside run folders"),
        (["eval", "weights.pth", "--data", "a=b"], "what stands before = is the set's name"),
        (["compare", "--recipe", "demo"], "give either run folders, or --recipe and --methods"),
        (["train", "absent.yaml"], "cannot be read"),
        (["resume", "absent"], "no run folder"),
        (["codec", "codec.txt"], "give codec.safetensors"),
        (["codec", "codec.safetensors", "--steps", "0"], "--steps 0: a codec is trained for at least 1 step"),
        (["codec", "codec.safetensors", "--steps", "-3"], "--steps -3: a codec is trained"),
        (
            ["init", "absent/x.yaml"],
            "absent/x.yaml: No such file or directory: give a path that exists, or make its folder",
        ),
        (
            ["export", "weights.pth", "-o", "other.pth"],
            "other.pth: Not a directory: a file is where a folder is needed",
        ),
        (["codec", "other.pth/codec.safetensors"], "other.pth: File exists: a file is where a folder is needed"),
        (["eval", "notes.md"], "notes.md: cannot be read as weights: it is no file of torch.save"),
        (["eval", "objects.pth"], "it holds Python objects besides tensors, which may run code"),
        (["eval", "empty.pth"], "empty.pth: cannot be read as weights: it is empty or was cut short"),
    ],
)
def test_bad_input_is_2_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    from safetensors.torch import load_file

    from tests.trainers.tiny import write_teacher

    monkeypatch.chdir(tmp_path)
    torch.save({"params": load_file(write_teacher(tmp_path / "t.safetensors"))}, tmp_path / "weights.pth")
    torch.save({"params": {"w": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save({"params": argparse.Namespace()}, tmp_path / "objects.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "notes.md").write_text("# Notes\n")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_compare_trains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "measure_costs", lambda configs, folder: None)  # tested in test_compare.py
    config, out = write_tiny(tmp_path, "facd"), tmp_path / "comparison"
    command = ["compare", "--recipe", str(config), "--methods", "facd", "--seeds", "3,4", "--out", str(out)]
    assert main(command) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert list(found["arms"]) == ["scratch", "output", "facd"]
    assert all(arm["seeds"] == [3, 4] for arm in found["arms"].values())
    trained = (out / "scratch-seed3" / "metrics.jsonl").stat().st_mtime
    assert main(command) == 0  # again: everything is there
    assert (out / "scratch-seed3" / "metrics.jsonl").stat().st_mtime == trained
    assert main(["compare", str(out / "scratch-seed3"), str(out / "facd-seed3"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").is_file()


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "contrastive_ratio: cpu" in said or "contrastive_ratio: reference" in said or torch.cuda.is_available()


def test_a_bug_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", broken)
    with pytest.raises(ZeroDivisionError):  # Python prints it and exits with 1
        main(["doctor"])


def test_a_path_of_our_own_that_is_missing_is_a_bug() -> None:
    def absent(path: Path) -> tuple[int, str] | None:
        return cli.exit_code(FileNotFoundError(errno.ENOENT, "No such file or directory", str(path)))

    assert absent(Path(cli.__file__).with_name("absent.yaml")) is None
    assert absent(Path("absent.yaml")) is not None
    assert cli.exit_code(OSError(errno.EBADF, "Bad file descriptor")) is None


@pytest.mark.parametrize("out", ["afile", "."])
def test_a_file_where_a_run_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    for name in ("afile", "scratch"):
        (tmp_path / name).touch()
    assert main(["train", str(write_tiny(tmp_path)), "--set", f"out={tmp_path / out}", "--set", "name=scratch"]) == 2
    assert "scratch: Not a directory: a file is where a folder is needed" in capsys.readouterr().err


def test_a_full_disk_outside_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["init", str(tmp_path / "x.yaml")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'x.yaml'}: No space left on device: free some space\n"
    assert list(tmp_path.iterdir()) == []  # nothing that was cut short


def test_a_reader_that_ends_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trainers", "init", "--schema"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize(("command", "advice"), [("export", "--size 128x128"), ("train", "train.accumulate=2")])
def test_advice_where_memory_runs_out_is_that_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, advice: str
) -> None:
    def greedy(options: object) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, f"_{command}", greedy)
    assert main([command, "given"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("out of memory (MemoryError)\n")
    assert advice in said
    assert "resume" not in said


def test_ctrl_c_outside_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", stopped)
    assert main(["doctor"]) == 130
