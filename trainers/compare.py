"""Finished runs side by side, in one report and one result.json; and the runs themselves, where they are missing."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainers import page, report
from trainers.checkpoint import replace_file
from trainers.errors import InputError
from trainers.results import Run, at, flat, load_run

if TYPE_CHECKING:
    from trainers.config import Config

BASELINES = {
    "scratch": "what distillation gained over plain training cannot be read here",
    "output": "what features add to imitating the teacher's image cannot be read here",
}
RECORDING = ("val.save_images", "train.save_every", "train.keep", "train.log_every")
# What may differ between runs without a word: what is compared, names and places, and how much is written down.
FREE = ("name", "out", "method", "teacher", *RECORDING)
# What may differ from the config of a run that is to be used again: it has no influence on the weights, but for rounding.
NEUTRAL = ("data.workers", "train.accumulate", *RECORDING)
MACHINE = ("python", "packages", "cpu", "threads", "gpu")


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes <out>/report.html and <out>/result.json about finished runs; returns the report's path.

    Whatever else than the method differs between the runs (steps, batch, seed, data, machine, ...) is listed in the report.

    Raises:
        InputError: fewer than two runs, a run that is not done, or runs that were not measured alike: another protocol, task, scale or
            validation set.
    """
    _refuse_too_few(run_dirs)
    runs = labelled([load_run(Path(folder)) for folder in run_dirs])
    refuse_unlike(runs)
    out.mkdir(parents=True, exist_ok=True)
    found = summary(runs)
    title = f"Comparison: {', '.join(run.label for run in runs)}"
    kicker = f"comparison of {len(runs)} runs · {report.task(runs[0])}"
    warned = page.warning("These runs differ in more than their method:", found["differences"])
    text = page.page(title, kicker, found["headline"], found["remarks"], [warned, *report.body(runs)])
    replace_file(out / "result.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(out / "report.html", text.encode())
    return out / "report.html"


def run_and_compare(
    config_path: Path, methods: Sequence[str], out: Path, overrides: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Trains one config with each method in <out>/<method>, then compares the runs in <out>; returns the report's path.

    What is there is used: a finished run of the same config is taken as it is, an unfinished one is resumed. So a comparison that was
    interrupted goes on where it stopped, and one that is done is only written again.

    Raises:
        InputError: fewer than two methods, problems of the config under any of the methods, or a folder that holds a run of another config.
        Diverged, Interrupted, SaveFailed: see trainers.launch.train.
    """
    from trainers.check import checked_config
    from trainers.launch import resume, train

    _refuse_too_few(methods)
    console = console or Console(stderr=True)
    configs = [
        checked_config(config_path, [*overrides, f"method.name={method}"], console.print).model_copy(
            update={"name": method, "out": str(out)}
        )
        for method in dict.fromkeys(methods)
    ]
    for config in configs:
        folder = Path(config.out) / config.name
        if not (folder / "config.yaml").is_file():
            console.print(f"training {config.name}")
            train(config, console)
            continue
        _refuse_other_config(folder, config)
        if (folder / "result.json").is_file():
            console.print(f"{config.name} is done: {folder}")
        else:
            console.print(f"resuming {config.name}")
            resume(folder, console=console)
    return compare([Path(config.out) / config.name for config in configs], out)


def _refuse_too_few(compared: Sequence[Path | str]) -> None:
    if len(set(compared)) < 2:
        given = ", ".join(map(str, compared)) or "nothing"
        raise InputError(f"{given}: a comparison needs two different runs or methods; add scratch")


def _refuse_other_config(folder: Path, wanted: Config) -> None:
    from trainers.config_file import changes, load_config

    found = changes(load_config(folder / "config.yaml"), wanted)
    found = [change for change in found if not _under(change.partition(":")[0], NEUTRAL)]
    if found:
        raise InputError(
            f"{folder} holds a run of another config ({', '.join(found[:5])}); give another --out, or remove the folder"
        )


# --- what may be compared --------------------------------------------------------------------------------------------------------


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Baselines first; a run is called by its method, or by its name (then its folder) where that is not unique."""
    order = list(BASELINES)
    ordered = sorted(runs, key=lambda run: order.index(run.method) if run.method in order else len(order))
    for label in (lambda run: run.result["name"], lambda run: str(run.folder)):
        taken = Counter(run.label for run in ordered)
        ordered = [dataclasses.replace(run, label=label(run)) if taken[run.label] > 1 else run for run in ordered]
    return ordered


def refuse_unlike(runs: Sequence[Run]) -> None:
    """InputError unless all runs were measured by one protocol on the same images."""
    first, problems = runs[0], []
    for run in runs[1:]:
        for key in ("protocol", "task", "scale"):
            if run.result[key] != first.result[key]:
                problems.append(_unlike(key, first, first.result[key], run, run.result[key]))
        if run.sets != first.sets:
            problems.append(_unlike("validation sets", first, ", ".join(first.sets), run, ", ".join(run.sets)))
            continue
        for name in first.sets:
            images, others = (r.result["sets"][name][r.baseline]["per_image"] for r in (first, run))
            if images != others:
                problems.append(
                    f"validation set {name}: {first.label} and {run.label} have other images or other scores of the "
                    f"{first.baseline} on them, so their own scores cannot be compared; run both on the same set"
                )
    if problems:
        raise InputError(problems)


def _unlike(what: str, first: Run, one: Any, run: Run, other: Any) -> str:
    return f"{what}: {one} in {first.folder}, but {other} in {run.folder}; only runs with the same can be compared"


def differences(runs: Sequence[Run]) -> list[str]:
    """What else differs between the runs: settings, the teacher, the machine and its software."""
    settings = [flat(run.settings) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in settings for key in tree) if not _under(key, FREE)]
    found = [_difference(key, runs, [tree.get(key) for tree in settings]) for key in keys]
    taught = [run for run in runs if run.result["teacher"]]
    found.append(_difference("teacher", taught, [_teacher(run) for run in taught]))
    machines = [flat(run.environment) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in machines for key in tree) if _under(key, MACHINE)]
    found += [_difference(key, runs, [tree.get(key) for tree in machines]) for key in keys]
    return [text for text in found if text]


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _difference(what: str, runs: Sequence[Run], values: Sequence[Any]) -> str:
    if all(value == values[0] for value in values):
        return ""
    return f"{what}: " + ", ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))


def _teacher(run: Run) -> str:
    teacher = run.result["teacher"]
    return f"{teacher['arch']} {teacher['options']} {teacher['weights']}"


# --- what was found --------------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The comparison's result.json: the numbers of the report, and the words that it opens with."""
    first = runs[0]
    sets: dict[str, Any] = {}
    for name in first.sets:
        sets[name] = {first.baseline: first.score(name, first.baseline), **{run.label: run.score(name) for run in runs}}
        if taught := report.with_teacher(runs):
            sets[name]["teacher"] = taught.score(name, "teacher")
    missing = [method for method in BASELINES if all(run.method != method for run in runs)]
    return {
        "headline": headline(runs),
        "remarks": remarks(runs, missing),
        "differences": differences(runs),
        "missing_baselines": missing,
        "protocol": first.result["protocol"],
        "protocol_text": first.result["protocol_text"],
        "task": first.result["task"],
        "scale": first.result["scale"],
        "sets": sets,
        "runs": {run.label: _facts(run) for run in runs},
    }


def _facts(run: Run) -> dict[str, Any]:
    kept = ("method", "steps", "seconds", "seed", "batch", "patch", "student", "teacher", "macs_for")
    return {"folder": str(run.folder), **{key: run.result[key] for key in kept}}


def headline(runs: Sequence[Run]) -> str:
    """Which run ends highest on the first validation set, and by how much."""
    name = runs[0].sets[0]
    best, second, *_ = ranked = sorted(runs, key=lambda run: -run.psnr(name))
    reached = f"{best.psnr(name):.2f}"
    gaps = [report.gap(best.psnr(name) - run.psnr(name)) for run in ranked[1:]]
    over = f"{report.gap(best.psnr(name) - best.psnr(name, best.baseline))} {report.REFERENCES[best.baseline]}"
    if len(runs) > 2:
        others = ", ".join(f"{gap} {run.label}" for gap, run in zip(gaps, ranked[1:], strict=True))
        return f"{best.label} ends highest on {name} with {reached} dB: {others}, {over}."
    if gaps == ["level with"]:
        return f"{best.label} and {second.label} end level on {name}: {reached} dB, {over}."
    return (
        f"{best.label} ends {gaps[0]} {second.label} on {name}: {reached} against {second.psnr(name):.2f} dB, {over}."
    )


def remarks(runs: Sequence[Run], missing: Sequence[str]) -> list[str]:
    """What the headline rests on, how it looks at equal time, and what it does not show."""
    first, name = runs[0], runs[0].sets[0]
    best, second, *_ = sorted(runs, key=lambda run: -run.psnr(name))
    images = best.result["sets"][name]["student"]["per_image"]
    others = second.result["sets"][name]["student"]["per_image"]
    ahead = sum(images[image]["psnr"] > others[image]["psnr"] for image in images)
    taught = report.with_teacher(runs)
    found = [
        f"Mean PSNR over {report.count(first, name)} by protocol {first.result['protocol']}; "
        f"{first.baseline} {first.psnr(name, first.baseline):.2f} dB"
        + (f", teacher {taught.psnr(name, 'teacher'):.2f} dB. " if taught else ". ")
        + f"{best.label} is ahead of {second.label} on {ahead} of {report.count(first, name)}.",
        equal_time(runs),
        seeds(runs),
        *(f"No {method} run is among these: {BASELINES[method]}." for method in missing),
    ]
    return [text for text in found if text]


def equal_time(runs: Sequence[Run]) -> str:
    """Where every run stood when the quickest one was done; "" when they took the same time."""
    name = runs[0].sets[0]
    quickest = min(runs, key=lambda run: run.seconds)
    end = quickest.validation(name, "seconds")[-1][0]
    stood = {run.label: at(run.validation(name, "seconds"), end) for run in runs}
    if all(run.seconds < 1.02 * quickest.seconds for run in runs):
        return ""
    told = ", ".join(
        f"{label} {'not yet validated' if psnr is None else f'{psnr:.2f} dB'}" for label, psnr in stood.items()
    )
    return (
        f"At equal training time ({report.duration(end)}, when {quickest.label} was done): {told}; between two validations the "
        "value is interpolated, and the slower runs were not yet at the end of their learning-rate schedule."
    )


def seeds(runs: Sequence[Run]) -> str:
    """What is known of the spread over seeds."""
    used = {run.method: {other.result["seed"] for other in runs if other.method == run.method} for run in runs}
    if any(len(values) > 1 for values in used.values()):
        return "Runs of one method that differ in their seed alone show the spread over seeds: read the other gaps on that scale."
    return (
        "One seed per method: how much another seed would change is not known from these runs. Gains of 0.02 to 0.1 dB, as distillation "
        "gives at small budgets, are about as large as that; a claim needs three paired seeds at least."
    )
