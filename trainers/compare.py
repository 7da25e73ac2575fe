"""Runs side by side, in one report; and the runs themselves, where they are missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.console import Console

from trainers import comparison_tables, page, report
from trainers.alike import BASELINES, NEUTRAL, arms_of, refuse_unlike, under
from trainers.costs import measure_costs, read_costs
from trainers.errors import InputError
from trainers.files import replace_file
from trainers.findings import summary
from trainers.json_text import to_json
from trainers.results import load_run

if TYPE_CHECKING:
    from trainers.config import Config

SLICED = "sliced"  # no method: plain training of a student that starts as a slice of its teacher


def compare(run_dirs: Sequence[Path], out: Path, refused: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Writes <out>/report.html, comparison.json and comparison.md about finished runs; returns the report's path.

    Runs that differ in their seed alone are one arm. Whatever else than the method differs between the arms (steps, batch, seeds, data,
    machine, ...) is listed in the report. The costs of <out>/costs.json are shown with them.

    Args:
        refused: methods that are not applicable, with the reason, for the tables.

    Raises:
        InputError: fewer than two arms, a run that is not done, or runs that were not measured alike: another protocol, task, scale or
            validation set.
    """
    _refuse_run_folder(out)
    folders = list({Path(folder).resolve(): Path(folder) for folder in run_dirs}.values())
    _refuse_too_few(folders)
    runs = [load_run(folder) for folder in folders]
    refuse_unlike(runs)
    arms = arms_of(runs)
    if len(arms) < 2:
        raise InputError(
            f"{arms[0].label}: the runs differ in their seed alone; a comparison needs two methods: add scratch"
        )
    out.mkdir(parents=True, exist_ok=True)
    costs = {label: cost for label, cost in read_costs(out).items() if label in {arm.label for arm in arms}}
    found = summary(arms, refused, costs)
    title = f"Comparison: {', '.join(arm.label for arm in arms)}"
    kicker = f"comparison of {len(arms)} methods in {len(runs)} runs · {report.task(arms[0].first)}"
    warned = page.warning("These runs differ in more than their method:", found["differences"])
    body = report.body(arms, comparison_tables.sections(arms, costs), refused)
    text = page.page(title, kicker, found["headline"], found["remarks"], [warned, *body])
    words = [found["headline"], *found["remarks"]]
    replace_file(out / "comparison.json", (to_json(found, indent=1) + "\n").encode())
    replace_file(out / "comparison.md", comparison_tables.markdown(arms, refused, costs, words).encode())
    replace_file(out / "report.html", text.encode())
    return out / "report.html"


def run_and_compare(
    config_path: Path,
    methods: Sequence[str],
    out: Path,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    console: Console | None = None,
) -> Path:
    """Trains one config with each method and seed in <out>/<method>-seed<seed>, then compares the runs; returns the report's path.

    Scratch and output are always among the methods, where they are applicable. What is there is used: a finished run of the same
    config is taken as it is, an unfinished one is resumed. So a comparison that was interrupted goes on where it stopped, and one that is
    done is only written again. What a step costs is measured once for each method.

    Args:
        methods: names of methods, or "sliced": plain training from a slice of the teacher.
        seeds: of the trainings; none takes the config's.

    Raises:
        InputError: fewer than two methods, problems of the config under any of the methods, or a folder that holds a run of another config.
        Diverged, Interrupted, SaveFailed: see trainers.launch.train.
    """
    _refuse_run_folder(out)
    console = console or Console(stderr=True)
    configs, refused = applicable(config_path, methods, overrides, console.print)
    for method, reason in refused.items():
        console.print(f"{method} is not applicable: {reason}", highlight=False, soft_wrap=True)
    _refuse_too_few(list(configs))
    used = seeds or [next(iter(configs.values())).train.seed]
    # Seed by seed: a comparison that is stopped early has all methods on the seeds that are done.
    planned = [_seeded(config, method, seed, out) for seed in dict.fromkeys(used) for method, config in configs.items()]
    for config in planned:
        _train_if_missing(config, console)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # on several devices Fabric runs this in a process for each
        console.print("measuring what a step of each method costs")
        measure_costs(configs, out)
        compare([Path(config.out) / config.name for config in planned], out, refused)
    return out / "report.html"


def applicable(
    config_path: Path, methods: Sequence[str], overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Config], dict[str, str]]:
    """Method -> its config, with the baselines first; and those that the task or the config does not admit, with the reason.

    Raises:
        InputError: any other problem of the config under any of the methods.
    """
    from trainers.check import checked_config
    from trainers.config_file import read_config

    configs, refused = {}, {}
    for method in dict.fromkeys([*BASELINES, *methods]):
        chosen = [f"method.name={method}"] if method != SLICED else ["method.name=scratch", "student.weights=teacher"]
        config = read_config(config_path, [*overrides, *chosen]).config
        reason = config and _refusal(config, added=method not in methods)
        if reason:
            refused[method] = reason
        else:
            configs[method] = checked_config(config_path, [*overrides, *chosen], say)
    return configs, refused


def _refusal(config: Config, *, added: bool) -> str | None:
    """Why a method cannot be part of this comparison; None where it can. A method that was asked for must have its teacher."""
    from trainers.config import slice_contradictions
    from trainers.methods import Run

    refusals = dict(config.method.refusals(Run(config.scale, config.data.patch)))
    if "name" in refusals:
        return refusals["name"]
    if added and config.method.needs_teacher and config.teacher is None:
        return "it needs a teacher, and this config has none"
    return next((text for key, text in slice_contradictions(config) if key == "student.weights"), None)


def _seeded(config: Config, method: str, seed: int, out: Path) -> Config:
    train = config.train.model_copy(update={"seed": seed})
    return config.model_copy(update={"name": f"{method}-seed{seed}", "out": str(out), "train": train})


def _train_if_missing(config: Config, console: Console) -> None:
    from trainers.launch import restart, resume, train
    from trainers.run_folder import RunFolder

    folder = Path(config.out) / config.name
    if not (folder / "config.yaml").is_file():
        console.print(f"training {config.name}")
        train(config, console)
        return
    _refuse_other_config(folder, config)
    if (folder / "result.json").is_file():
        console.print(f"{config.name} is done: {folder}")
    elif RunFolder(folder).checkpoints(keep=1).last() is None:
        console.print(f"training {config.name} from the start: it ended before its first checkpoint")
        restart(folder, console)
    else:
        console.print(f"resuming {config.name}")
        resume(folder, console=console)


def _refuse_run_folder(out: Path) -> None:
    if (out / "config.yaml").is_file():
        raise InputError(f"--out {out} is a run folder, whose report.html would be replaced: give another folder")


def _refuse_too_few(compared: Sequence[Path | str]) -> None:
    if len(compared) < 2:
        given = ", ".join(map(str, compared)) or "nothing"
        raise InputError(f"{given}: a comparison needs two different runs or methods; add scratch")


def _refuse_other_config(folder: Path, wanted: Config) -> None:
    from trainers.config_file import changes, load_config

    found = changes(load_config(folder / "config.yaml"), wanted)
    found = [change for change in found if not under(change.partition(":")[0], NEUTRAL)]
    if found:
        raise InputError(
            f"{folder} holds a run of another config ({', '.join(found[:5])}); give another --out, or remove the folder"
        )
