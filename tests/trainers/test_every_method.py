"""What every method must do in a run: train student and adapters, leave its teachers, resume exactly, and name a term that fails."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file

from tests.trainers.test_resume import run_killed
from tests.trainers.tiny import assert_same_state, last_state, metrics, tiny, write_yaml
from trainers.cli import main
from trainers.config_file import load_config
from trainers.launch import build_loop
from trainers.methods import METHODS, Batch
from trainers.models import find
from trainers.run_folder import RunFolder
from trainers.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

NAFNET = {"arch": "nafnet", "width": 4, "encoder_blocks": [1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1]}
OPTIONS: dict[str, dict[str, Any]] = {"dckd": {"history_every": [3]}, "slkd": {"size": 32}}
DISTILLING = [name for name in METHODS if name not in ("scratch", "output")]


def config(folder: Path, name: str, **train: Any) -> Path:
    """A tiny run of a method: x2 with EDSR, or denoising with NAFNet for the one of same-size tasks."""
    tree = tiny(folder, name, **train)
    tree["method"] |= OPTIONS.get(name, {})
    if name == "slkd":
        torch.manual_seed(3)
        entry = find("nafnet")
        wide = NAFNET | {"width": 6}
        options = entry.options(**{key: value for key, value in wide.items() if key != "arch"})
        save_file(entry.build(options).state_dict(), folder / "nafnet.safetensors")
        tree |= {"task": "denoise", "student": NAFNET, "teacher": wide | {"weights": "nafnet.safetensors"}}
    return write_yaml(folder, tree)


@pytest.mark.parametrize("name", DISTILLING)
def test_gradients_reach_the_student_and_its_adapters_and_no_teacher(tmp_path: Path, name: str) -> None:
    """All in one TrainStep: what Fabric sets up is everything that trains."""
    loaded = load_config(config(tmp_path, name))
    folder = RunFolder.create(loaded)
    loop = build_loop(Fabric(accelerator="cpu", devices=1), loaded, folder, resuming=False)
    folder.close()
    step = loop.train_step
    with torch.no_grad():  # a NAFNet starts with branches multiplied by 0
        for parameter in step.student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = Batch(torch.rand(4, 3, 16 // loaded.scale, 16 // loaded.scale), torch.rand(4, 3, 16, 16))
    with torch.no_grad():
        batch.shared = step.method.share(batch, step.teachers)
    losses = step(batch)
    assert tuple(losses) == step.method.losses
    torch.stack(list(losses.values())).sum().backward()
    silent = [
        key
        for key, parameter in step.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == []
    assert not any(parameter.requires_grad for module in step.frozen_modules() for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in step.method.parameters())


@pytest.mark.parametrize("name", ["csd", "skd", "dckd", "slkd"])
def test_resumes_exactly(tmp_path: Path, name: str) -> None:
    """Stopped after three of six steps, in which the history model of DCKD has just been updated, and resumed."""
    path = config(tmp_path, name, steps=6, save_every=3, schedule="constant", accumulate=2)
    runs, validated = tmp_path / "runs", ["--set", "val.every=3"]
    assert main(["train", str(path), *validated]) == 0
    assert main(["train", str(path), *validated, "--set", "name=halves", "--set", "train.steps=3"]) == 0
    assert main(["resume", str(runs / "halves"), "--set", "train.steps=6"]) == 0
    assert_same_state(last_state(runs / name), last_state(runs / "halves"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLING)
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, name: str) -> None:
    path = config(tmp_path, name, steps=20, save_every=8, log_every=4, accumulate=1 if name == "rkd" else 2)
    runs = tmp_path / "runs"
    assert main(["train", str(path)]) == 0
    killed = run_killed(13, "SIGKILL", "train", str(path), "--set", "name=killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(["resume", str(runs / "killed")]) == 0
    assert_same_state(last_state(runs / name), last_state(runs / "killed"))
    assert metrics(runs / name) == metrics(runs / "killed")


@pytest.mark.parametrize("name", ["skd", "dckd", "slkd"])
def test_a_term_that_fails_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TrainStep.forward

    def forward(self: TrainStep, batch: Any) -> dict[str, torch.Tensor]:
        losses = original(self, batch)
        last = list(losses)[-1]
        return {**losses, last: losses[last] * float("nan")}

    monkeypatch.setattr(TrainStep, "forward", forward)
    assert main(["train", str(config(tmp_path, name))]) == 4
    assert (
        f"loss term {METHODS[name][1].losses[-1] if name != 'dckd' else 'codebook'} became nan"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DISTILLING if name != "rkd"])
def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, name: str) -> None:
    path = config(tmp_path, name, steps=4, log_every=1)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), "--set", "name=split", "--set", "train.accumulate=2"]) == 0
    for one, two in zip(metrics(tmp_path / "runs" / name), metrics(tmp_path / "runs" / "split"), strict=True):
        if one["kind"] == "train":
            assert one["losses"] == pytest.approx(two["losses"], rel=2e-3)


def test_rkd_refuses_to_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config(tmp_path, "rkd", accumulate=2))]) == 2
    assert "train.accumulate: 2, but method rkd needs 1: its losses relate" in capsys.readouterr().err
