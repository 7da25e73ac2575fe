"""Reading run folders: what reports and comparisons are made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainers.errors import InputError

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what result.json, metrics.jsonl, config.yaml, env.json and command.txt hold.

    `label` names it in tables and legends: its method, or its own name where several runs of one method stand together.
    """

    folder: Path
    label: str
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    command: str

    @property
    def method(self) -> str:
        return str(self.result["method"])

    @property
    def baseline(self) -> str:
        """What restored images are compared with: "bicubic" upsampling, or the "input" itself where it has the same size."""
        return baseline_name(int(self.result["scale"]))

    @property
    def steps(self) -> int:
        return int(self.result["steps"])

    @property
    def seconds(self) -> float:
        """Training time, without validation and saving."""
        return float(self.result["seconds"])

    @property
    def sets(self) -> list[str]:
        return list(self.result["sets"])

    def score(self, set_name: str, who: str = "student") -> dict[str, Any] | None:
        """{"psnr", "ssim", "per_image"} of the baseline, "student" or "teacher" on a validation set; None where there is none."""
        found: dict[str, Any] | None = self.result["sets"][set_name].get(who)
        return found

    def psnr(self, set_name: str, who: str = "student") -> float:
        return float(self.result["sets"][set_name][who]["psnr"])

    def validation(self, set_name: str, against: str) -> Points:
        """(step or seconds, PSNR) of each validation; `against` is "step" or "seconds"."""
        lines = (line for line in self.metrics if line["kind"] == "val" and line["set"] == set_name)
        return [(float(line[against]), float(line["psnr"])) for line in lines]

    def training(self, group: str, name: str) -> Points:
        """(step, value) of one entry of "losses", "weights" or "shares" along the run."""
        lines = (line for line in self.metrics if line["kind"] == "train")
        return [(float(line["step"]), float(line[group][name])) for line in lines if name in line.get(group, {})]

    def names(self, group: str) -> list[str]:
        """The entries that "losses", "weights" or "shares" have, in the order of their first appearance."""
        lines = (line for line in self.metrics if line["kind"] == "train")
        return list(dict.fromkeys(name for line in lines for name in line.get(group, {})))


def load_run(folder: Path) -> Run:
    """The run in `folder`, labelled by its method. InputError when it is no run folder or is not done."""
    result_file = folder / "result.json"
    if not result_file.is_file():
        what = "is no run folder" if not (folder / "config.yaml").is_file() else "is not done (it has no result.json)"
        todo = "give a folder that kdtrain wrote" if "no run" in what else f"finish it with: kdtrain resume {folder}"
        raise InputError(f"{folder}: {what}; {todo}")
    result = _json(result_file.read_text(), str(result_file))
    if result.get("status") != "done":
        raise InputError(f"{folder}: its status is {result.get('status')!r}; finish it with: kdtrain resume {folder}")
    metrics = list(_lines(folder / "metrics.jsonl"))
    environment = _json(_text(folder / "env.json") or "{}", str(folder / "env.json"))
    settings: dict[str, Any] = yaml.safe_load(_text(folder / "config.yaml")) or {}
    command = _text(folder / "command.txt").strip()
    return Run(folder, str(result["method"]), result, metrics, settings, environment, command)


def baseline_name(scale: int) -> str:
    """ "bicubic" or, for tasks that keep the size of an image, "input"."""
    return "input" if scale == 1 else "bicubic"


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            yield _json(line, f"{path}:{number}")


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}); remove the folder and run again") from None
    return found


def at(points: Points, x: float) -> float | None:
    """The value at x, on the straight line between the validations around it; None before the first and after the last."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
