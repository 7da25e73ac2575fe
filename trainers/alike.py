"""Which runs may stand side by side: those that differ in their seed alone become one arm, others must have been measured alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainers.errors import InputError
from trainers.results import Arm, Run, flat

BASELINES = {
    "scratch": "what distillation gained over plain training cannot be read here",
    "output": "what features add to imitating the teacher's image cannot be read here",
}
RECORDING = ("val.save_images", "train.save_every", "train.keep", "train.log_every", "train.tensorboard")
# What may differ from the config of a run that is to be used again: it has no influence on the weights, but for rounding.
NEUTRAL = ("data.workers", "train.accumulate", *RECORDING)
# What may differ between arms without a word: what is compared, names and places, and how much is written down.
FREE = ("name", "out", "method", "teacher", "train.seed", *RECORDING)
MACHINE = ("python", "packages", "cpu", "threads", "gpu")


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs of one config but for the seed, as one arm each, baselines first.

    An arm is called by its method, or by its runs' names (then their folder) where that is not unique.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = {
            key: value
            for key, value in flat(run.settings).items()
            if not under(key, ("name", "out", "train.seed", *NEUTRAL))
        }
        groups.setdefault(json.dumps([run.method, kept], sort_keys=True, default=str), []).append(run)
    found = []
    for group in groups.values():
        unique = len({run.seed for run in group}) == len(group)
        together = (
            [group] if unique else [[run] for run in group]
        )  # a seed that was run twice shows no spread over seeds
        found += [Arm(some[0].method, tuple(sorted(some, key=lambda run: run.seed))) for some in together]
    order = list(BASELINES)
    found.sort(key=lambda arm: order.index(arm.method) if arm.method in order else len(order))
    for label in (_common_name, lambda arm: str(arm.first.folder)):
        taken = Counter(arm.label for arm in found)
        found = [Arm(label(arm), arm.runs) if taken[arm.label] > 1 else arm for arm in found]
    return found


def _common_name(arm: Arm) -> str:
    """What the names of an arm's runs have in common, facd of facd-seed0 and facd-seed1; else the first name."""
    names = [str(run.result["name"]) for run in arm.runs]
    seeded = [name.removesuffix(f"-seed{run.seed}") for name, run in zip(names, arm.runs, strict=True)]
    return seeded[0] if len(set(seeded)) == 1 else names[0]


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
                    f"validation set {name}: {first.folder} and {run.folder} have other images or other scores of the "
                    f"{first.baseline} on them, so their own scores cannot be compared; run both on the same set"
                )
    if problems:
        raise InputError(problems)


def _unlike(what: str, first: Run, one: Any, run: Run, other: Any) -> str:
    return f"{what}: {one} in {first.folder}, but {other} in {run.folder}; only runs with the same can be compared"


def differences(arms: Sequence[Arm]) -> list[str]:
    """What else differs between the arms: settings, seeds, the teacher, the machine and its software."""
    settings = [flat(arm.first.settings) for arm in arms]
    keys = [key for key in dict.fromkeys(key for tree in settings for key in tree) if not under(key, FREE)]
    found = [_difference(key, arms, [tree.get(key) for tree in settings]) for key in keys]
    found.append(_difference("seeds", arms, [", ".join(map(str, arm.seeds)) for arm in arms]))
    taught = [arm for arm in arms if arm.first.result["teacher"]]
    found.append(_difference("teacher", taught, [_teacher(arm.first) for arm in taught]))
    machines = [[flat(run.environment) for run in arm.runs] for arm in arms]
    known = dict.fromkeys(key for trees in machines for tree in trees for key in tree)
    for key in (key for key in known if under(key, MACHINE)):
        values = [" and ".join(dict.fromkeys(str(tree.get(key)) for tree in trees)) for trees in machines]
        found.append(_difference(key, arms, values))
    return [text for text in found if text]


def under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or inside one of them."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _difference(what: str, arms: Sequence[Arm], values: Sequence[Any]) -> str:
    if all(value == values[0] for value in values):
        return ""
    return f"{what}: " + "; ".join(f"{arm.label} {value}" for arm, value in zip(arms, values, strict=True))


def _teacher(run: Run) -> str:
    teacher = run.result["teacher"]
    return f"{teacher['arch']} {teacher['options']} {teacher['weights']}"
