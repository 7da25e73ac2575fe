"""The loop: however a batch is split its result is the same; whatever ends a run is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainers.tiny import TEACHER, last_state, metrics, tiny, write_images, write_tiny, write_yaml
from trainers import loop, schedule
from trainers.checkpoint import SaveFailed
from trainers.cli import main
from trainers.config import Train
from trainers.config_file import load_config
from trainers.ema import EMA
from trainers.launch import make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(run: Path) -> list[tuple[str, float]]:
    """All losses and shares of a run, in order."""
    lines = [line for line in metrics(run) if line["kind"] == "train"]
    return [
        (f"{line['step']} {name}", value) for line in lines for name, value in (line["losses"] | line["shares"]).items()
    ]


def assert_same_training(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    """The same losses and weights up to rounding; Adam's first steps enlarge it, as they divide by tiny gradients."""
    assert dict(losses(one)) == pytest.approx(dict(losses(two)), rel=tolerance)
    first, second = last_state(one), last_state(two)
    for name in first:
        if name.startswith(".weights"):
            torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", ["facd", "output"])
def test_accumulation_changes_nothing(tmp_path: Path, method: str) -> None:
    config = write_tiny(tmp_path, method, steps=6)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=split", "--set", "train.accumulate=2"]) == 0
    assert_same_training(tmp_path / "runs" / method, tmp_path / "runs" / "split")


def test_validation_in_tiles_finds_the_same(tmp_path: Path) -> None:
    """The tiny network sees hardly farther than a quarter of the overlap."""
    tree = tiny(tmp_path) | {"val": {"every": 2, "tile": None}}
    write_images(tmp_path / "large", 1, (150, 200))
    tree["data"]["val"] = [{"name": "large", "gt": "large"}]
    config = write_yaml(tmp_path, tree)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=tiled", "--set", "val.tile=64"]) == 0
    whole, tiled = (
        [line["psnr"] for line in metrics(tmp_path / "runs" / name) if line["kind"] == "val"]
        for name in ("scratch", "tiled")
    )
    assert tiled == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("method", ["facd", "output"])
def test_two_processes_change_nothing(tmp_path: Path, method: str) -> None:
    config = write_tiny(tmp_path, method, steps=6)
    weights = ["--set", f"method.weights.{'contrast' if method == 'facd' else 'output'}={{share: 0.2}}"]
    assert main(["train", str(config), *weights]) == 0
    command = [sys.executable, "-m", "trainers", "train", str(config), *weights]
    two = subprocess.run(
        [*command, "--set", "name=two", "--set", "train.devices=2"], capture_output=True, text=True, timeout=300
    )
    assert two.returncode == 0, two.stderr
    assert_same_training(tmp_path / "runs" / method, tmp_path / "runs" / "two")
    assert (
        len([name for name in last_state(tmp_path / "runs" / "two") if "randomness" in name and name.endswith("torch")])
        == 2
    )


def test_two_processes_fail_together(tmp_path: Path) -> None:
    """The second run of a name: the first rank finds the folder, the other must not wait for it forever."""
    config = write_tiny(tmp_path)
    assert main(["train", str(config)]) == 0
    command = [sys.executable, "-m", "trainers", "train", str(config), "--set", "train.devices=2"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 2
    assert second.stderr.count("holds a run already") == 1


def test_processes_leave_each_other_before_they_end(tmp_path: Path) -> None:
    """Also when they fail: threads of a group that is still open can abort a process at its end (exit code -6 and not 2)."""
    config, script = write_tiny(tmp_path), tmp_path / "train.py"
    assert main(["train", str(config)]) == 0
    script.write_text(
        "import atexit, os, sys, torch\n"
        "from trainers.cli import main\n"
        "said = {True: b'open\\n', False: b'closed\\n'}\n"
        "atexit.register(lambda: os.write(1, said[torch.distributed.is_initialized()]))\n"  # in one piece, whoever else writes
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(script), "train", str(config), "--set", "train.devices=2"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 2
    assert second.stdout.split() == ["closed", "closed"]


def test_data_workers_change_nothing(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=workers", "--set", "data.workers=2"]) == 0
    assert losses(tmp_path / "runs" / "scratch") == losses(tmp_path / "runs" / "workers")


def test_methods_start_from_the_same_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def stop(self: loop.Loop, progress: object) -> None:
        started.append({name: value.clone() for name, value in self.train_step.student.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "run", stop)
    assert [main(["train", str(write_tiny(tmp_path, method))]) for method in ("scratch", "facd")] == [130, 130]
    assert all(torch.equal(value, started[1][name]) for name, value in started[0].items())


def test_a_run_learns_and_leaves_everything(tmp_path: Path) -> None:
    tree = tiny(tmp_path, "facd", steps=120, lr=5e-3, save_every=60, log_every=20)
    tree["val"]["every"] = 40
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    run = tmp_path / "runs" / "facd"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "done"
    assert set(result["sets"]["val"]) == {"bicubic", "student", "teacher"}
    assert result["teacher"]["options"]["features"] == TEACHER["features"]
    lines = metrics(run)
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    assert train[-1]["losses"]["pixel"] < 0.85 * train[0]["losses"]["pixel"]
    assert [line["step"] for line in val] == [40, 80, 120]
    assert val[-1]["psnr"] == pytest.approx(result["sets"]["val"]["student"]["psnr"])
    assert result["best"] == max(({"step": v["step"], "psnr": v["psnr"]} for v in val), key=lambda best: best["psnr"])
    total = sum(train[-1]["weights"][name] * value for name, value in train[-1]["losses"].items())
    assert train[-1]["total"] == pytest.approx(total)
    kept = {path.name for path in (run / "images" / "val").iterdir()}
    assert kept == {f"image0_{who}.png" for who in ("lq", "bicubic", "student", "teacher", "gt")}
    for name in ("config.yaml", "env.json", "command.txt", "report.html"):
        assert (run / name).stat().st_size > 0


def test_so_many_images_are_saved(tmp_path: Path) -> None:
    tree = tiny(tmp_path, steps=1)
    write_images(tmp_path / "val", 3, seed=9)
    tree["val"]["save_images"] = 2
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    found = {path.name for path in (tmp_path / "runs" / "scratch" / "images" / "val").iterdir()}
    assert found == {f"image{index}_{who}.png" for index in (0, 1) for who in ("lq", "gt", "bicubic", "student")}


def test_bf16_trains_with_float32_weights_and_losses(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "facd", steps=20, lr=5e-3, precision="bf16")
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "facd"
    assert all(value.dtype == torch.float32 for name, value in last_state(run).items() if name.startswith(".weights"))
    train = [line["losses"]["pixel"] for line in metrics(run) if line["kind"] == "train"]
    assert train[-1] < train[0]


def test_divergence_names_the_first_term_and_keeps_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, "output", steps=8, save_every=3)
    spoil(monkeypatch, step=5)
    assert main(["train", str(config)]) == 4
    assert "loss term output became nan in step 6" in capsys.readouterr().err
    run = tmp_path / "runs" / "output"
    batch = torch.load(run / "diverged-step-000006.pt", weights_only=True)
    assert batch["gt"].shape == (4, 3, 16, 16)
    assert math.isnan(batch["losses"]["output"])
    assert math.isfinite(batch["losses"]["pixel"])
    assert (run / "checkpoints" / "last").read_text() == "step-000003\n"
    monkeypatch.undo()
    assert main(["resume", str(run)]) == 0


def spoil(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """One term becomes NaN in the step after `step`."""
    from trainers.step import TrainStep

    original, calls = TrainStep.forward, []

    def forward(self: TrainStep, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        found = original(self, batch)
        # Steps 0, 2, 4, ... measure the shares in a forward pass of their own.
        return {**found, "output": found["output"] * float("nan")} if len(calls) > step + step // 2 + 1 else found

    monkeypatch.setattr(TrainStep, "forward", forward)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")],
)
def test_out_of_memory_gives_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(self: loop.Loop, *images: object) -> None:
        raise error

    monkeypatch.setattr(loop.Loop, "_step", fail)
    assert main(["train", str(write_tiny(tmp_path))]) == 3
    assert "train.accumulate" in capsys.readouterr().err


def test_a_failed_save_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise SaveFailed("the checkpoint of step 4 could not be written")

    monkeypatch.setattr(loop.Loop, "save", full)
    assert main(["train", str(write_tiny(tmp_path))]) == 1
    assert "could not be written" in capsys.readouterr().err


def test_learning_rate() -> None:
    train = Train(steps=110, lr=1.0, lr_min=0.1, warmup=10)
    assert schedule.learning_rate(train, 0) == pytest.approx(0.1)
    assert schedule.learning_rate(train, 10) == pytest.approx(1.0)
    assert schedule.learning_rate(train, 60) == pytest.approx(0.55)
    assert schedule.learning_rate(train, 110) == pytest.approx(0.1)
    assert schedule.learning_rate(Train(steps=110, lr=1.0, schedule="constant"), 99) == 1.0
    halved = Train(steps=110, lr=1.0, schedule="step", milestones=[20, 50])
    assert [schedule.learning_rate(halved, step) for step in (0, 19, 20, 49, 50, 109)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_betas_reach_the_optimizer(tmp_path: Path) -> None:
    config = load_config(write_tiny(tmp_path, betas=[0.9, 0.99]))
    assert make_optimizer(config.train, nn.Linear(2, 2)).param_groups[0]["betas"] == (0.9, 0.99)


def test_the_average_is_its_formula() -> None:
    network = torch.nn.Conv2d(1, 1, 1)
    ema, expected = EMA(network, decay=0.3), network.weight.detach().clone()
    for step in range(6):
        torch.nn.init.constant_(network.weight, float(step))
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.network.weight, expected)


def test_the_average_has_the_buffers_of_the_weights_and_no_graph() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    average = EMA(network, 0.9)
    for step in range(3):
        network(torch.rand(2, 3, 5, 5))
        before = [buffer.clone() for buffer in network.buffers()]
        average.update(step)
        assert all(map(torch.equal, network.buffers(), before))
        assert all(map(torch.equal, average.network.buffers(), before))
    assert not average.network.training
    assert not any(weight.requires_grad for weight in average.network.parameters())
