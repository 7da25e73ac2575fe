"""What is shown: a bar in a terminal, lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainers import progress
from trainers.progress import TrainingProgress


def shown(*, terminal: bool, shown: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with TrainingProgress(console, 0, 100, shown=shown) as bar:
        for step in range(1, 101):
            bar.advance(step)
            if step % 50 == 0:
                bar.losses(step, {"pixel": 0.03125, "contrast": 1.5}, rate=31.26)
        bar.say("step 100: set  PSNR 30.000 dB")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_bar_in_a_terminal() -> None:
    text = shown(terminal=True)
    for expected in ("100/100", "31.3 steps/s", "pixel 0.03125  contrast 1.5", "0:00:00", "PSNR 30.000 dB"):
        assert expected in text


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    first, second, said = shown(terminal=False).splitlines()
    assert first.startswith("step 50/100  31.3 steps/s  0:")
    assert first.endswith("left  pixel 0.03125  contrast 1.5")
    assert second.startswith("step 100/100")
    assert said == "step 100: set  PSNR 30.000 dB"


def test_few_lines_of_a_fast_run() -> None:
    assert [line[:8] for line in shown(terminal=False).splitlines()] == ["step 50/", "step 100", "step 100"]


def test_nothing_on_other_ranks() -> None:
    assert shown(terminal=False, shown=False) == shown(terminal=True, shown=False) == ""
