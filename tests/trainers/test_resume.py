"""A run that was killed and resumed is the run that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.trainers.test_loop import assert_same_training
from tests.trainers.tiny import assert_same_state, last_state, metrics, tiny, write_images, write_tiny, write_yaml
from trainers import launch
from trainers.checkpoint import Checkpoints
from trainers.cli import main
from trainers.loop import Loop
from trainers.results import load_run
from trainers.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

KILLED_IN_STEP = """
import os, signal, sys
from trainers import cli, loop

original = loop.Loop._step

def step(self, *arguments):
    if self.position.step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return original(self, *arguments)

loop.Loop._step = step
sys.exit(cli.main(sys.argv[1:]))
"""


def run_killed(step: int, with_signal: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """kdtrain in a process of its own, which receives the signal in the step after `step`."""
    code = KILLED_IN_STEP.format(step=step, signal=with_signal)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("method", "task"), [("scratch", "derain"), ("facd", "sr")])
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, method: str, task: str) -> None:
    config = write_tiny(tmp_path, method, steps=40, save_every=20, log_every=3, accumulate=2)
    runs = tmp_path / "runs"
    changed = [f"task={task}"] if method == "scratch" else ["method.weights.contrast={share: 0.1}"]
    weights = [part for text in changed for part in ("--set", text)]
    assert main(["train", str(config), *weights]) == 0
    killed = run_killed(27, "SIGKILL", "train", str(config), "--set", "name=killed", *weights)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert metrics(runs / "killed")[-1]["step"] == 27  # logged after the checkpoint of step 20: must be cut back
    assert main(["resume", str(runs / "killed")]) == 0
    assert_same_state(last_state(runs / method), last_state(runs / "killed"))
    assert metrics(runs / method) == metrics(runs / "killed")


@pytest.mark.parametrize("with_signal", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_state(tmp_path: Path, with_signal: str) -> None:
    config = write_tiny(tmp_path, steps=12, save_every=6, log_every=3)
    runs = tmp_path / "runs"
    assert main(["train", str(config)]) == 0
    stopped = run_killed(4, with_signal, "train", str(config), "--set", "name=stopped")
    assert stopped.returncode == 130, stopped.stderr
    assert "step 5" in stopped.stderr
    assert (runs / "stopped" / "checkpoints" / "last").read_text() == "step-000005\n"
    assert main(["resume", str(runs / "stopped")]) == 0
    assert_same_state(last_state(runs / "scratch"), last_state(runs / "stopped"))


def test_sigterm_outside_of_the_steps_interrupts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the results are written: the state is saved already, and resume goes on to write them."""
    monkeypatch.setattr(launch, "write_results", lambda *arguments, **named: signal.raise_signal(signal.SIGTERM))
    config = write_tiny(tmp_path)
    run = tmp_path / "runs" / "scratch"
    assert main(["train", str(config)]) == 130
    assert (run / "checkpoints" / "last").read_text() == "step-000004\n"
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    assert main(["resume", str(run)]) == 0
    assert (run / "report.html").is_file()


def test_sigterm_to_the_whole_group_saves_the_state(tmp_path: Path) -> None:
    """A scheduler signals every process of a job, data workers too."""
    config = write_tiny(tmp_path, steps=1_000_000, log_every=5)
    command = [sys.executable, "-m", "trainers", "train", str(config), "--set", "data.workers=1"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        lines = tmp_path / "runs" / "scratch" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not lines.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        subprocess.run(["kill", "-TERM", "--", f"-{process.pid}"], check=True)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (tmp_path / "runs" / "scratch" / "checkpoints" / "last").is_file()


def test_resume_reports_changes_and_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    run = tmp_path / "runs" / "scratch"
    assert main(["train", str(config)]) == 0
    capsys.readouterr()
    assert main(["resume", str(run), "--set", "train.steps=6", "--set", "train.lr=1.0e-4"]) == 0
    said = capsys.readouterr()
    assert "train.steps: 4 -> 6" in said.out + said.err
    assert "train.lr: 0.001 -> 0.0001" in said.out + said.err
    assert metrics(run)[-1]["step"] == 6
    assert "steps: 6" in (run / "config.yaml").read_text()


def test_scores_are_never_those_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run that is trained further, and interrupted, is not done."""
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    run = tmp_path / "runs" / "scratch"
    first = (run / "result.json").read_bytes()
    assert main(["resume", str(run)]) == 0  # nothing to train
    assert not (run / "result-4.json").exists()
    with monkeypatch.context() as interrupting:
        interrupting.setattr(Loop, "_agree", lambda self, requested: True)
        assert main(["resume", str(run), "--set", "train.steps=7"]) == 130
    assert (run / "result-4.json").is_file()
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--size", "16x24"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 of 7 steps" in card
    assert "Not measured" in card
    assert main(["compare", str(run), str(tmp_path / "other"), "-o", str(tmp_path / "compared")]) == 2
    assert "is not done" in capsys.readouterr().err
    assert main(["resume", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 7
    assert json.loads((run / "result-4.json").read_text())["sets"] == json.loads(first)["sets"]


def test_scores_of_another_step_are_not_on_the_card(tmp_path: Path) -> None:
    """As earlier versions left them behind."""
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    file = tmp_path / "runs" / "scratch" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 3}))
    assert main(["export", str(file.parent), "-o", str(tmp_path / "out"), "--size", "16x24"]) == 0
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


def test_fewer_steps_than_were_trained_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    run = tmp_path / "runs" / "scratch"
    before = (run / "config.yaml").read_text(), (run / "result.json").read_text()
    assert main(["resume", str(run), "--set", "train.steps=3"]) == 2
    assert "train.steps: 3, but" in capsys.readouterr().err
    assert ((run / "config.yaml").read_text(), (run / "result.json").read_text()) == before


@pytest.mark.parametrize("change", ["val.protocol=dehaze-rgb", "data.val=[{name: val, gt: {folder}/other}]"])
def test_resume_with_another_validation_starts_a_new_series(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny(tmp_path, steps=4, save_every=2)
    tree["val"]["every"] = 2
    write_images(tmp_path / "other", 1, seed=3)
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    run = tmp_path / "runs" / "scratch"
    before = [line for line in metrics(run) if line["kind"] == "val"]
    changed = ["--set", change.replace("{folder}", str(tmp_path))]
    assert main(["resume", str(run), *changed, "--set", "train.steps=6"]) == 0
    assert "val: val: measured in another way" in capsys.readouterr().err
    assert [line for line in metrics(run) if line["kind"] == "val"][: len(before)] == before  # nothing is lost
    found = load_run(run)
    curve = found.validation("val", "step")
    assert [step for step, _ in curve] == [4, 6]
    assert curve[0][1] != before[-1]["psnr"]
    step, psnr = max(curve, key=lambda point: point[1])
    assert found.result["best"] == {"step": step, "psnr": psnr}
    lines = metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-000006")  # as if it was killed before
    assert main(["resume", str(run)]) == 0
    assert metrics(run) == lines


def test_resume_with_another_term_between_two_lines(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "dckd", steps=5, log_every=2, save_every=3)
    assert main(["train", str(config), "--set", "train.steps=3", "--set", "train.log_every=2"]) == 0
    checkpoints = Checkpoints(tmp_path / "runs" / "dckd" / "checkpoints", keep=1)
    path, _, state = checkpoints.read_last()
    state["window"] = {"losses": [torch.zeros(4)], "seconds": 1.0, "waited": 0.0}  # as of a step between two lines
    torch.save(state, path / "state.pt")
    more = ["--set", "method.label_consistency=true", "--set", "train.steps=5"]
    assert main(["resume", str(tmp_path / "runs" / "dckd"), *more]) == 0
    assert metrics(tmp_path / "runs" / "dckd")[-2]["losses"]["label_consistency"] > 0


def test_resume_refuses_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    assert main(["train", str(config)]) == 0
    changed = ["--set", "student.features=5", "--set", "train.steps=6"]
    assert main(["resume", str(tmp_path / "runs" / "scratch"), *changed]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert "features: 4" in (tmp_path / "runs" / "scratch" / "config.yaml").read_text()


def test_a_run_without_a_checkpoint_is_trained_from_the_start(tmp_path: Path) -> None:
    """As if nothing had been: with the metrics of the new steps alone."""
    config = write_tiny(tmp_path, steps=40, save_every=20, log_every=3)
    assert main(["train", str(config)]) == 0
    killed = run_killed(7, "SIGKILL", "train", str(config), "--set", "name=killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "runs" / "killed"
    assert metrics(run)[-1]["step"] == 6
    launch.restart(run, Console(quiet=True))
    assert_same_state(last_state(tmp_path / "runs" / "scratch"), last_state(run))
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(tmp_path / "runs" / "scratch")]


def test_a_finished_run_is_not_called_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No step is left in which another method could train it; other validations keep the scores before."""
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    run = tmp_path / "runs" / "scratch"
    first = (run / "result.json").read_bytes()
    for changed, said in (("train.lr=1.0e-4", "is done at step 4"), ("name=other", "keeps its name and place")):
        assert main(["resume", str(run), "--set", changed]) == 2
        assert said in capsys.readouterr().err
    assert (run / "result.json").read_bytes() == first
    for images, aside in enumerate(("result-4.json", "result-4-2.json"), 2):
        before = (run / "result.json").read_bytes()
        assert main(["resume", str(run), "--set", f"val.save_images={images}"]) == 0
        assert (run / aside).read_bytes() == before


def test_short_memory_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No advice to remove what may well be intact."""
    assert main(["train", str(write_tiny(tmp_path))]) == 0
    run = tmp_path / "runs" / "scratch"

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 68511172 bytes from file: Cannot allocate memory (12)")

    for where in ("safetensors.torch.load_file", "torch.nn.Module.load_state_dict"):
        with monkeypatch.context() as running_short:
            running_short.setattr(where, short)
            assert main(["resume", str(run)]) == 3
            said = capsys.readouterr().err
            assert "out of memory" in said
            assert "remove" not in said
    assert main(["resume", str(run)]) == 0


def test_an_existing_run_is_refused_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    assert main(["train", str(config)]) == 0
    before = last_state(tmp_path / "runs" / "scratch")
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "kdtrain resume" in said
    assert "--set name=" in said
    assert_same_state(before, last_state(tmp_path / "runs" / "scratch"))


def test_two_processes_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    assert main(["train", str(config)]) == 0
    folder = RunFolder.open(tmp_path / "runs" / "scratch")
    try:
        # In a process of its own: the lock belongs to a process, not to an object.
        command = [sys.executable, "-m", "trainers", "resume", str(folder.path)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        folder.close()
    assert second.returncode == 2
    assert "in use by another" in second.stderr


@pytest.mark.parametrize("present", [False, True])
def test_resume_without_a_run_or_a_checkpoint(
    tmp_path: Path, present: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if present:
        (run / "config.yaml").write_text(write_tiny(tmp_path).read_text().replace("gt: ", f"gt: {tmp_path}/"))
    assert main(["resume", str(run)]) == 2
    assert ("no checkpoint" if present else "run folder") in capsys.readouterr().err


def test_resume_in_another_memory_layout(tmp_path: Path) -> None:
    """A fused optimiser pairs weights and moments by where they lie: saved ones must take the new layout."""
    config = write_tiny(tmp_path, steps=6, save_every=3, schedule="constant", log_every=1)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=part", "--set", "train.steps=3"]) == 0
    other = ["--set", "train.channels_last=false", "--set", "train.steps=6"]
    assert main(["resume", str(tmp_path / "runs" / "part"), *other]) == 0
    assert_same_training(tmp_path / "runs" / "scratch", tmp_path / "runs" / "part")
