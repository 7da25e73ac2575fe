"""What a training run shows while it runs: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_UPDATES = 0.1


class TrainingProgress:
    """Steps done, losses, rate and remaining time. `shown=False` (ranks other than the first) shows nothing."""

    def __init__(self, console: Console, start: int, steps: int, *, shown: bool) -> None:
        self.console = console
        self.shown = shown
        self.steps = steps
        self._started = time.monotonic()
        self._first = start
        self._last = 0.0
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=steps, completed=start, rate="", losses="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """One more step is done; cheap enough to be called after each."""
        now = time.monotonic()
        if self._bar and (now - self._last > SECONDS_BETWEEN_UPDATES or step == self.steps):
            self._last = now
            self._bar.update(self._task, completed=step)

    def losses(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """New averages of the losses, and steps per second."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step, losses=text, rate=f"{rate:.1f} steps/s")
        elif self.shown and (now - self._last > SECONDS_BETWEEN_LINES or step == self.steps):
            self._last = now
            self.say(f"step {step}/{self.steps}  {rate:.1f} steps/s  {self._remaining(step)} left  {text}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _remaining(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(1, step - self._first)
        minutes, seconds = divmod(round(per_step * (self.steps - step)), 60)
        return f"{minutes}:{seconds:02d}"
