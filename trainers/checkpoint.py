"""Checkpoints: directories that are complete or not there at all.

    checkpoints/step-000500/{student,ema}.safetensors, state.pt
    checkpoints/last, checkpoints/best      text files with a directory's name

A save writes step-N.tmp, syncs it to the disk, renames it, then replaces the pointer `last` by a rename. A kill or a full
disk at any moment leaves the previous checkpoint and its pointer as they were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from trainers.errors import InputError, OutOfMemory, out_of_memory
from trainers.files import replace_file, sync_folder, write_synced

Weights = Mapping[str, Tensor]


class SaveFailed(Exception):
    """A checkpoint could not be written; the previous one is intact."""


class Checkpoints:
    """The folder of checkpoints of one run.

    Args:
        folder: <run>/checkpoints.
        keep: newest ones to keep; the one that `best` points to stays besides.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        weights: Mapping[str, Weights],
        state: Mapping[str, Any],
        *,
        best: bool,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes one checkpoint; when it returns, `last` (and `best`) point to it and it is on the disk.

        Args:
            weights: file name without extension -> state dict, written as safetensors.
            state: tensors and plain Python types, readable by torch.load(weights_only=True).
            metadata: of the safetensors files.

        Raises:
            SaveFailed: the disk is full or gone. Nothing of this checkpoint stays.
        """
        final = self.folder / f"step-{step:06d}"
        unfinished = final.with_suffix(".tmp")
        try:
            self._sweep()
            if self.last() != final:
                if final.is_dir():  # complete, but no pointer reached it before a kill
                    final.rename(final.with_suffix(".old"))
                unfinished.mkdir(parents=True)
                for name, tensors in weights.items():
                    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                    content = safetensors.torch.save(contiguous, None if metadata is None else dict(metadata))
                    write_synced(unfinished / f"{name}.safetensors", content)
                with (unfinished / "state.pt").open("wb") as file:
                    torch.save(dict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(unfinished)
                unfinished.rename(final)
                sync_folder(self.folder)
            for pointer in ["best", "last"] if best else ["last"]:
                replace_file(self.folder / pointer, f"{final.name}\n".encode())
        except (OSError, RuntimeError) as error:  # torch.save reports a short write as RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            previous = self.last()
            run = self.folder.parent
            kept = (
                f"The checkpoint of {previous.name} is intact: free some space, then kdtrain resume {run}"
                if previous
                else f"There is no earlier checkpoint: free some space, remove {run} and start again with kdtrain train"
            )
            raise SaveFailed(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}. {kept}"
            ) from error
        self._forget_old()
        return final

    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        return self._target("last") or max(self._complete(), key=step_of, default=None)

    def read_last(self) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The newest complete checkpoint, and what `read_checkpoint` makes of it.

        Raises:
            InputError: there is none, or it is damaged.
        """
        path = self.last()
        if path is None:
            raise InputError(
                f"{self.folder.parent} has no checkpoint yet: remove the folder and start again with kdtrain train"
            )
        try:
            return path, *read_checkpoint(path)
        except InputError as error:
            earlier = [other for other in self._complete() if other != path]
            instead = f"remove {path} to go on from {earlier[-1].name}" if earlier else "there is no earlier one"
            raise InputError([*error.problems, instead]) from None

    def best(self) -> Path | None:
        """The checkpoint with the best validation result."""
        return self._target("best")

    def _target(self, pointer: str) -> Path | None:
        try:
            target = self.folder / (self.folder / pointer).read_text().strip()
        except OSError:
            return None
        return target if target in self._complete() else None

    def _complete(self) -> list[Path]:
        """In the order of their steps: names grow a digit at step 1,000,000."""
        found = (path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
        return sorted((path for path in found if (path / "state.pt").is_file()), key=step_of)

    def _forget_old(self) -> None:
        spared = {self.last(), self.best()}
        for path in self._complete()[: -self.keep]:
            if path not in spared:
                # Renamed first: what still has its name is complete even when the deletion is cut short.
                path.rename(path.with_suffix(".old"))
        self._sweep()

    def _sweep(self) -> None:
        for path in [*self.folder.glob("*.tmp"), *self.folder.glob("*.old")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(file name without extension -> state dict, state) of a checkpoint directory, on the CPU.

    Raises:
        InputError: the directory holds no readable checkpoint.
        OutOfMemory, PermissionError: it may well be intact.
    """
    try:
        files = list(path.glob("*.safetensors"))
        for file in (*files, path / "state.pt"):
            file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        weights = {file.stem: safetensors.torch.load_file(file) for file in files}
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # the readers raise many types for a broken file
        if out_of_memory(error):
            raise OutOfMemory(f"out of memory while {path} was read: free some, and try again") from None
        raise InputError(f"{path}: cannot be read as a checkpoint: {error}") from None
    return weights, state
