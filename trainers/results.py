"""Reading run folders: what reports and comparisons are made from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from trainers.errors import InputError
from trainers.json_text import from_json

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what result.json, metrics.jsonl, config.yaml, env.json and command.txt hold."""

    folder: Path
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
    def seed(self) -> int:
        return int(self.result["seed"])

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
        """(step or seconds, PSNR) of each validation since it is measured as it is now; `against` is "step" or "seconds"."""
        points: Points = []
        for line in self.metrics:
            if line["kind"] == "series" and set_name in line["sets"]:
                points = []
            elif line["kind"] == "val" and line["set"] == set_name:
                points.append((float(line[against]), float(line["psnr"])))
        return points

    def training(self, group: str, name: str) -> Points:
        """(step, value) of one entry of "losses", "weights" or "shares" along the run."""
        lines = (line for line in self.metrics if line["kind"] == "train")
        return [(float(line["step"]), float(line[group][name])) for line in lines if name in line.get(group, {})]

    def names(self, group: str) -> list[str]:
        """The entries that "losses", "weights" or "shares" have, in the order of their first appearance."""
        lines = (line for line in self.metrics if line["kind"] == "train")
        return list(dict.fromkeys(name for line in lines for name in line.get(group, {})))


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, as one: figures are means over the seeds.

    `label` names it in tables and legends.
    """

    label: str
    runs: tuple[Run, ...]
    """One for each seed, in ascending order."""

    @property
    def first(self) -> Run:
        """The run of the lowest seed: what all runs of an arm share is read from it."""
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def seconds(self) -> float:
        """Training time, without validation and saving."""
        return mean(run.seconds for run in self.runs)

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def baseline(self) -> str:
        """See Run.baseline."""
        return self.first.baseline

    @property
    def steps(self) -> int:
        return self.first.steps

    @property
    def sets(self) -> list[str]:
        return self.first.sets

    def score(self, set_name: str, who: str = "student") -> dict[str, Any] | None:
        """{"psnr", "ssim", "per_image"} as Run.score has it."""
        found = [score for run in self.runs if (score := run.score(set_name, who))]
        if not found:
            return None
        images = [score["per_image"] for score in found]
        return _means(found) | {"per_image": {name: _means([scores[name] for scores in images]) for name in images[0]}}

    def psnr(self, set_name: str, who: str = "student") -> float:
        return mean(run.psnr(set_name, who) for run in self.runs)

    def spread(self, set_name: str) -> float | None:
        """Standard deviation of the student's PSNR over the seeds; None for a single one."""
        return deviation(run.psnr(set_name) for run in self.runs) if len(self.runs) > 1 else None

    def by_seed(self, set_name: str, seconds: float | None = None) -> dict[int, float]:
        """Seed -> the student's PSNR at the end, or after so many seconds of training, where it was measured by then."""
        if seconds is None:
            return {run.seed: run.psnr(set_name) for run in self.runs}
        stood = {run.seed: at(run.validation(set_name, "seconds"), seconds) for run in self.runs}
        return {seed: psnr for seed, psnr in stood.items() if psnr is not None}

    def validation(self, set_name: str, against: str) -> Points:
        """(step or seconds, PSNR) of each validation that all runs have."""
        return [
            (mean(x for x, _ in points), mean(y for _, y in points)) for points in self._validated(set_name, against)
        ]

    def band(self, set_name: str, against: str) -> list[tuple[float, float, float]]:
        """(step or seconds, lowest, highest PSNR of any seed) of each validation; nothing for a single seed."""
        if len(self.runs) == 1:
            return []
        return [
            (mean(x for x, _ in points), min(y for _, y in points), max(y for _, y in points))
            for points in self._validated(set_name, against)
        ]

    def _validated(self, set_name: str, against: str) -> list[Points]:
        return list(map(list, zip(*(run.validation(set_name, against) for run in self.runs), strict=False)))

    def training(self, group: str, name: str) -> Points:
        """(step, value) of one entry of "losses", "weights" or "shares" along the runs."""
        values: dict[float, list[float]] = {}
        for run in self.runs:
            for step, value in run.training(group, name):
                values.setdefault(step, []).append(value)
        return [(step, mean(found)) for step, found in values.items()]

    def names(self, group: str) -> list[str]:
        """See Run.names."""
        return self.first.names(group)


def _means(scores: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: mean(score[key] for score in scores) for key in ("psnr", "ssim")}


def load_run(folder: Path) -> Run:
    """The run in `folder`. InputError when it is no run folder or is not done."""
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
    return Run(folder, result, metrics, settings, environment, command)


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
        found: dict[str, Any] = from_json(text)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}); remove the folder and run again") from None
    return found


def difference(ours: float, theirs: float) -> float:
    """ours - theirs, and 0 of two that are infinite, as the PSNR of equal images is."""
    return 0.0 if ours == theirs else ours - theirs


def deviation(values: Iterable[float]) -> float:
    """Standard deviation of two or more; NaN where one is infinite."""
    values = list(values)
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def at(points: Points, x: float) -> float | None:
    """The value at x, on the straight line between the validations around it; None before the first and after the last."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y1 if x1 == x or y1 == y0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
