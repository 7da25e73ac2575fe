"""The folder of a run: its config, environment, metrics, and the lock that keeps a second process out."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count, takewhile
from pathlib import Path
from typing import IO, Any

from trainers.checkpoint import Checkpoints, SaveFailed
from trainers.config import Config
from trainers.config_file import dump_config
from trainers.errors import InputError
from trainers.events import Events
from trainers.files import replace_file
from trainers.json_text import from_json, to_json
from trainers.signals import Interrupted

LOCK = ".lock"
PACKAGES = ("kdops", "torch", "triton", "lightning-fabric", "numpy", "pydantic", "safetensors", "scikit-image")


class RunFolder:
    """<out>/<name>/ with config.yaml, env.json, command.txt, metrics.jsonl, checkpoints/, images/, result.json, report.html."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: Events | None = None
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Makes and locks the folder of a new run.

        Raises:
            InputError: it exists already.
        """
        folder = cls(Path(config.out) / config.name)
        if folder.path.exists() and {path.name for path in folder.path.iterdir()} - {LOCK}:
            raise InputError(
                f"{folder.path} holds a run already: go on with it (kdtrain resume {folder.path}), "
                "choose another name (--set name=...), or remove it"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._acquire()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Locks the folder of an earlier run.

        Raises:
            InputError: another process is working in it.
        """
        folder = cls(path)
        folder._acquire()
        return folder

    def checkpoints(self, keep: int) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", keep)

    @contextmanager
    def telling_how_to_go_on(self) -> Iterator[None]:
        """Within, a failure gets a note that says from where a resume goes on, or that there is nothing to resume."""
        try:
            yield
        except (Interrupted, SaveFailed):
            raise  # they say it themselves
        except Exception as error:
            last = self.checkpoints(keep=1).last()
            if last is None:
                error.add_note(f"nothing has been saved yet: remove {self.path} and start again with kdtrain train")
            else:
                error.add_note(f"kdtrain resume {self.path} goes on from {last.name}")
            raise

    def describe(self, config: Config) -> None:
        """Writes config.yaml and env.json, and adds the command to command.txt."""
        replace_file(self.path / "config.yaml", dump_config(config).encode())
        replace_file(self.path / "env.json", (json.dumps(environment(), indent=1) + "\n").encode())
        with (self.path / "command.txt").open("a") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def set_result_aside(self) -> None:
        """Renames result.json to result-<steps>.json, or result-<steps>-2.json ...: its scores are not those of what is to come."""
        path = self.path / "result.json"
        if path.is_file():
            name = f"result-{json.loads(path.read_text())['steps']}"
            others = (f"{name}-{number}" for number in count(2))
            aside = next(name for name in chain([name], others) if not (self.path / f"{name}.json").exists())
            path.rename(path.with_name(f"{aside}.json"))

    def cut_metrics(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`: what happened after the checkpoint will happen again.

        So will what an earlier resume from this step began with a new series of validations.
        """
        path = self.path / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [line for line in takewhile(lambda line: not _is_series(line, step), lines) if _step(line) <= step]
            replace_file(path, "".join(line + "\n" for line in kept).encode())

    def validated(self, step: int) -> dict[str, float]:
        """Set name -> PSNR of the validations of `step` in metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        lines = [from_json(line) for line in text.splitlines() if _step(line) == step]
        return {line["set"]: line["psnr"] for line in lines if line["kind"] == "val"}

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(to_json(line) + "\n")
        self._metrics.flush()
        if self.events is not None:
            self.events.log(line)

    def sync(self) -> None:
        """Puts metrics.jsonl on the disk: before a checkpoint, so that no line up to its step can be missing."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Ends all writing and releases the lock; a folder that nothing was written to goes."""
        if self.events is not None:
            self.events.close()
        if self._lock is not None:
            with suppress(OSError):  # the folder is gone, or its file system keeps open files
                if [path.name for path in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
        for file in (self._metrics, self._lock):
            # On a full disk what `log` could not write, and said so, would be written now.
            with suppress(OSError):
                if file is not None:
                    file.close()
        self._metrics = self._lock = None

    def _acquire(self) -> None:
        self._lock = (self.path / LOCK).open("w")
        try:
            # A POSIX record lock: gone with this process however it ends, and not inherited by data workers.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"{self.path} is in use by another kdtrain process: wait for it or stop it") from None


def _step(line: str) -> float:
    """The step of a metrics line; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _is_series(line: str, step: int) -> bool:
    """Whether the line begins a new series of validations at this step."""
    return _step(line) == step and json.loads(line).get("kind") == "series"


def environment() -> dict[str, Any]:
    """Versions, machine and the backends of kdops: what a result depends on."""
    import torch

    import kdops

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found["packages"] = {name: _version(name) for name in PACKAGES}
    found["cpu"] = _cpu_name()
    found["threads"] = torch.get_num_threads()
    found["gpu"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found["kdops"] = kdops.info()
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
