"""TensorBoard events: the numbers of metrics.jsonl once more."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trainers.errors import InputError


def events_problems() -> list[str]:
    """The package, where it is missing."""
    installed = importlib.util.find_spec("tensorboard") is not None
    return [] if installed else ["train.tensorboard needs the package: pip install 'kdops[tensorboard]'"]


class Events:
    """Writes to a folder that TensorBoard reads.

    Args:
        step: steps that are done; events after it, of a part that is trained again, are hidden.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        absent = events_problems()
        if absent:
            raise InputError(absent)
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """The numbers in a line of metrics.jsonl, under names like train/losses/pixel and val/photos/psnr."""
        top = f"val/{line['set']}" if line["kind"] == "val" else line["kind"]
        for key, value in line.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, float):
                    self._writer.add_scalar(f"{top}/{key}/{name}".rstrip("/"), number, line["step"])

    def close(self) -> None:
        self._writer.close()
