"""TensorBoard events are optional."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.trainers.tiny import write_tiny
from trainers.cli import main

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(not INSTALLED, reason="needs kdops[tensorboard]")
def test_events_hold_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", str(write_tiny(tmp_path)), "--set", "train.tensorboard=true"]) == 0
    events = EventAccumulator(str(tmp_path / "runs" / "scratch" / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/losses/pixel")] == [2, 4]
    assert "val/val/psnr" in events.Tags()["scalars"]


@pytest.mark.skipif(INSTALLED, reason="needs tensorboard to be absent")
@pytest.mark.parametrize("command", ["check", "train"])
def test_without_the_package_it_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(write_tiny(tmp_path)), "--set", "train.tensorboard=true"]) == 2
    assert "pip install 'kdops[tensorboard]'" in capsys.readouterr().err
