"""What goes wrong during a run ends in an exact resume or in a clear refusal, and nothing that was saved is lost: docs/faults.md.

Faults at chosen places are in test_resume.py (kill -9 and signals in a step) and test_checkpoint.py (kill -9 at every write of a save).
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainers.tiny import assert_same_state, last_state, metrics, tiny, write_tiny, write_yaml
from trainers import cli, loop
from trainers.checkpoint import Checkpoints
from trainers.cli import main
from trainers.data.images import write_png
from trainers.data.pairs import Pairs
from trainers.data.sets import TrainSet
from trainers.errors import Diverged
from trainers.loop import Loop

pytestmark = pytest.mark.usefixtures("one_thread")

# kdtrain, which first runs `before`: what a test changes in a process of its own.
PATCHED = """
import os, signal, sys
from pathlib import Path
from trainers import cli
from trainers.checkpoint import Checkpoints
from trainers.loop import Loop

def every_step(act):
    original = Loop._step
    def step(self, *arguments):
        act(self)
        return original(self, *arguments)
    Loop._step = step

{before}
sys.exit(cli.main(sys.argv[1:]))
"""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Does something before the step after `step`."""
    original = Loop._step

    def acting(self: Loop, *arguments: object) -> torch.Tensor:
        if self.position.step == step:
            act()
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_step", acting)


def start(before: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PATCHED.format(before=before), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def best_of(run: Path) -> tuple[str, object]:
    """The checkpoint and the result that are the best."""
    return (run / "checkpoints" / "best").read_text(), json.loads((run / "result.json").read_text())["best"]


def last_step(run: Path) -> int:
    """The step of the last checkpoint, which must be readable."""
    step = last_state(run)[".state.step"]
    assert isinstance(step, int)
    return step


# Says once where training begins, and then whether it is saving, so that the test knows what it interrupted.
TELLING = """
original = Checkpoints.save
def save(self, *arguments, **named):
    saved = original(self, *arguments, **named)
    print("saved", flush=True)
    return saved
Checkpoints.save = save
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # twenty starts of a process, each of many seconds on a busy machine
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """kill -9 up to 0.3 s after the first checkpoint of each attempt, with a checkpoint every other step."""
    config = write_tiny(tmp_path, "facd", steps=1_000_000, save_every=2, log_every=3, schedule="constant")
    run, reached, unfinished = tmp_path / "runs" / "facd", 0, 0
    dice = random.Random(0)
    for attempt in range(20):
        with start(TELLING, *(["resume", str(run)] if attempt else ["train", str(config)])) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "saved\n", finish(process)[1]
            time.sleep(dice.uniform(0, 0.3))
            process.kill()
        unfinished += any((run / "checkpoints").glob("*.tmp*"))
        assert last_step(run) > reached  # what was saved is there, complete, and each attempt went on from it
        reached = last_step(run)
    print(f"twenty kills, {unfinished} of them while a checkpoint was written, to step {reached}")
    steps = ["--set", f"train.steps={reached + 3}"]
    assert main(["resume", str(run), *steps]) == 0
    assert main(["train", str(config), *steps, "--set", "name=whole"]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "whole"), last_state(run))
    assert metrics(tmp_path / "runs" / "whole") == metrics(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the command mount")
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, "output", steps=12, save_every=2, log_every=1)
    assert main(["train", str(config)]) == 0
    run, filler = small_disk / "output", small_disk / "filler"

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2**22))

    at_step(monkeypatch, 5, fill)
    assert main(["train", str(config), "--set", f"out={small_disk}"]) == 1
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    assert "kdtrain resume" in errors
    assert last_step(run) == 4
    monkeypatch.undo()
    filler.unlink()
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "output"), last_state(run))
    assert metrics(tmp_path / "runs" / "output") == metrics(run)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # not in place: tensors that were read from it are views of the file
    path.write_bytes(content[:-100])


@pytest.mark.parametrize("file", ["state.pt", "student.safetensors", "ema.safetensors"])
def test_a_truncated_checkpoint_is_refused_and_the_one_before_goes_on(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, steps=6, save_every=2)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "scratch"
    whole, broken = last_state(run), run / "checkpoints" / "step-000006"
    truncate(broken / file)
    assert main(["resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{broken}: cannot be read as a checkpoint" in said
    assert f"remove {broken} to go on from step-000004" in said
    shutil.rmtree(broken)
    assert main(["resume", str(run)]) == 0
    assert_same_state(whole, last_state(run))


def test_pointers_that_were_lost_are_found_again(tmp_path: Path) -> None:
    """`last` is a convenience: without it the newest complete checkpoint is the last."""
    config = write_tiny(tmp_path, steps=4, save_every=2)
    assert main(["train", str(config)]) == 0
    checkpoints = tmp_path / "runs" / "scratch" / "checkpoints"
    for content in (b"", b"\0\0\0", b"step-000099\n"):
        (checkpoints / "last").write_bytes(content)
        assert Checkpoints(checkpoints, keep=2).last() == checkpoints / "step-000004"


WORKER_KILLED = """
import multiprocessing
def kill(loop):
    if loop.position.step == 4:
        multiprocessing.active_children()[0].kill()
every_step(kill)
"""


def test_a_dead_data_worker_ends_the_run_clearly(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, steps=60, save_every=3)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "killed"
    code, errors = finish(start(WORKER_KILLED, "train", str(config), "--set", "name=killed", "--set", "data.workers=1"))
    assert code == 1, errors
    assert "a data worker has ended" in errors
    assert "kdtrain resume" in errors
    assert "Traceback" not in errors
    assert last_step(run) >= 3
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "scratch"), last_state(run))


def test_data_workers_have_ended_before_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that died while the message is made would put its own in the way."""

    def fail() -> None:
        assert multiprocessing.active_children()
        raise Diverged("as if")

    def told(error: Exception) -> tuple[int, str] | None:
        assert not multiprocessing.active_children()
        return cli_exit_code(error)

    cli_exit_code = cli.exit_code
    monkeypatch.setattr(cli, "exit_code", told)
    at_step(monkeypatch, 2, fail)
    assert main(["train", str(write_tiny(tmp_path, steps=60)), "--set", "data.workers=1"]) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, steps=30, save_every=2)
    assert main(["train", str(config)]) == 0
    monkeypatch.setitem(
        Pairs.__init__.__kwdefaults__, "cache_bytes", 0
    )  # each image is read again whenever it is needed
    image, away = tmp_path / "train" / "image0.png", tmp_path / "away.png"
    at_step(monkeypatch, 4, lambda: image.rename(away))
    named = ["--set", "name=lost", "--set", f"data.workers={workers}"]
    assert main(["train", str(config), *named]) == 2
    said = capsys.readouterr().err
    assert f"{image}: no such file" in said
    assert "kdtrain resume" in said
    run = tmp_path / "runs" / "lost"
    assert last_step(run) >= 4
    monkeypatch.undo()
    away.rename(image)
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "scratch"), last_state(run))


def test_a_bad_validation_image_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    write_png(tmp_path / "val" / "small.png", torch.zeros(3, 12, 12))
    (tmp_path / "val" / "text.png").write_text("no image")
    Image.new("CMYK", (48, 40)).save(tmp_path / "val" / "print.jpg")
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "print.jpg: mode CMYK is not supported" in said
    assert "small.png: 12x12 is smaller than 16x16, the least that protocol sr-y measures" in said
    assert "text.png: cannot be read as an image" in said
    assert not (tmp_path / "runs" / "scratch" / "metrics.jsonl").exists()


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_validation_that_fails_costs_nothing(
    tmp_path: Path, save_every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is saved before; the resume validates it once the image is back."""
    tree = tiny(tmp_path, steps=6, save_every=save_every)
    tree["val"]["every"] = 2
    config = write_yaml(tmp_path, tree)
    assert main(["train", str(config)]) == 0
    image, run = tmp_path / "val" / "image0.png", tmp_path / "runs" / "broken"
    whole = image.read_bytes()
    image.write_bytes(whole[:-300])  # its header is good
    assert main(["train", str(config), "--set", "name=broken"]) == 2
    said = capsys.readouterr().err
    assert f"{image}: cannot be read as an image" in said
    assert f"kdtrain resume {run} goes on" in said
    assert last_step(run) == 2
    image.write_bytes(whole)
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "scratch"), last_state(run))
    assert metrics(tmp_path / "runs" / "scratch") == metrics(run)


def test_a_kill_after_a_validation_does_not_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are there, but the checkpoint was written before and does not know the best result."""
    tree = tiny(tmp_path, steps=6, save_every=2)
    tree["val"]["every"] = 2
    config = write_yaml(tmp_path, tree)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "killed"

    def die() -> None:
        raise Diverged("as if killed")

    at_step(monkeypatch, 4, die)
    assert main(["train", str(config), "--set", "name=killed"]) == 4
    monkeypatch.undo()
    (run / "checkpoints" / "best").unlink()
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "scratch"), last_state(run))
    assert metrics(tmp_path / "runs" / "scratch") == metrics(run)
    assert best_of(run) == best_of(tmp_path / "runs" / "scratch")


def test_a_nan_in_a_batch_stops_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, "output", steps=9, save_every=3)
    assert main(["train", str(config)]) == 0
    original = TrainSet.samples

    def spoiled(self: TrainSet, seed: int, step: int, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
        lq, gt = original(self, seed, step, indices)
        if step == 5:
            lq[1, 0, 2, 3] = float("nan")
        return lq, gt

    monkeypatch.setattr(TrainSet, "samples", spoiled)
    assert main(["train", str(config), "--set", "name=unsaved", "--set", "train.save_every=9"]) == 4
    said = capsys.readouterr().err
    assert "nothing has been saved yet: remove" in said
    assert "resume" not in said
    assert main(["train", str(config), "--set", "name=spoiled"]) == 4
    said = capsys.readouterr().err
    assert "loss term pixel became nan in step 6" in said
    assert "spoiled goes on from step-000003" in said
    run = tmp_path / "runs" / "spoiled"
    assert torch.load(run / "diverged-step-000006.pt", weights_only=True)["lq"].isnan().any()
    assert last_step(run) == 3  # step 6 was due to be saved
    monkeypatch.undo()
    assert main(["resume", str(run)]) == 0
    assert_same_state(last_state(tmp_path / "runs" / "output"), last_state(run))


def test_a_divergence_on_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(loop, "replace_file", full)
    config = write_tiny(tmp_path, steps=4)
    assert main(["train", str(config), "--set", "train.lr=1.0e+30", "--set", "train.lr_min=1.0e+30"]) == 4
    said = capsys.readouterr().err
    assert "loss term pixel became" in said
    assert "its batch could not be written" in said


WAITING = """
def wait(loop):
    if loop.position.step == 4:
        print("here", flush=True)
        sys.stdin.readline()
every_step(wait)
"""


def test_a_second_run_in_a_folder_leaves_the_first_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, steps=8, save_every=2)
    assert main(["train", str(config), "--set", "name=alone"]) == 0
    command = [sys.executable, "-c", PATCHED.format(before=WAITING), "train", str(config)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdout.readline() == "here\n"
        run = tmp_path / "runs" / "scratch"
        assert main(["train", str(config)]) == 2
        assert "holds a run already" in capsys.readouterr().err
        assert main(["resume", str(run)]) == 2
        assert "in use by another kdtrain process" in capsys.readouterr().err
        _, errors = first.communicate("\n", timeout=300)
    assert first.returncode == 0, errors
    assert_same_state(last_state(tmp_path / "runs" / "alone"), last_state(run))
    assert metrics(tmp_path / "runs" / "alone") == metrics(run)
