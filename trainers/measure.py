"""`kdtrain eval`: PSNR and SSIM of a run, a checkpoint or weights on any images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from rich.table import Table

from trainers.config import Data, ValSet
from trainers.data.degradations import AnyDegradation, Bicubic
from trainers.data.sets import open_val_set, val_problems
from trainers.errors import InputError
from trainers.evaluate import baseline, evaluate
from trainers.fields import PHOTOS
from trainers.json_text import to_json
from trainers.metrics import PROTOCOLS, Protocol
from trainers.no_reference import NoReference, read_brisque
from trainers.sources import Source, open_source
from trainers.tasks import TASKS, Task
from trainers.terminal import plain_console, print_whole

DIGITS = {"psnr": 3, "ssim": 4}  # in tables; 2 for others


@dataclass(frozen=True)
class Wanted:
    """What `kdtrain eval` was asked for. None: as in the run, or as the task has it."""

    data: list[str]
    """NAME=PLACE or PLACE of ground truths: a folder, an image or photos. None of them: the run's validation sets, or photos."""
    lq: Path | None = None
    """Folder of their inputs, or the one image; None makes them by the degradation."""
    lq_template: str = "{}"
    """As in a config."""
    task: str | None = None
    """Chooses degradation and protocol."""
    degradation: str | None = None
    """As in a config, in YAML: {name: noise, sigma: 15}. It makes the inputs of all sets but those of `lq`."""
    protocol: str | None = None
    """How to measure."""
    tile: int | None = None
    """Side of a tile in pixels of the input; 0 restores images whole."""
    ensemble: bool = False
    """Average over the eight orientations."""
    piqe: bool = False
    """Also measure PIQE."""
    brisque: Path | None = None
    """Also measure BRISQUE with OpenCV's model in this file."""


def measure(source: Path, wanted: Wanted) -> dict[str, Any]:
    """{"weights", "arch", "options", "task", "protocol", "baseline", "sets": {name: {<baseline>: ..., "network": ...}}}.

    A run is measured as its training measures it, unless something else was asked for.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or a file of weights.

    Raises:
        InputError: no weights, images, task or protocol there.
    """
    opened = open_source(source)
    task = chosen_task(opened, wanted)
    protocol = chosen_protocol(opened, wanted, task)
    data = Data(degradation=chosen_degradation(opened, wanted, task), grey=opened.grey)
    extra = NoReference(wanted.piqe, None if wanted.brisque is None else read_brisque(wanted.brisque))
    tile = chosen_tile(opened, wanted)
    restorer = opened.restorer(tile=tile, ensemble=wanted.ensemble)
    worse_name, worse = baseline(opened.network.scale)
    sets, degradations = {}, {}
    for name, chosen in chosen_sets(opened, wanted, task).items():
        degradation = chosen.made_by(data.degradation)
        if chosen.lq is None and degradation is None:
            raise InputError(f"--data {name}: task {task.name} makes no inputs by itself: give --lq or --degradation")
        problems = val_problems(chosen, opened.network.scale, protocol, headers_only=True)
        if problems:
            raise InputError(problems)
        pairs = open_val_set(chosen, opened.network.scale, data)
        degradations[name] = degradation and degradation.model_dump(mode="json")
        sets[name] = {
            who: evaluate(one, pairs, protocol, opened.network.scale, opened.device, extra)
            for who, one in ((worse_name, worse), ("network", restorer))
        }
    return {
        "weights": str(opened.weights),
        "arch": opened.entry.name,
        "options": opened.options.model_dump(mode="json"),
        "task": task.name,
        "degradations": degradations,
        "tile": tile,
        "ensemble": wanted.ensemble,
        "protocol": protocol.name,
        "protocol_text": protocol.describe(),
        "baseline": worse_name,
        "sets": sets,
    }


def chosen_task(opened: Source, wanted: Wanted) -> Task:
    """The task that was asked for, that of the run, or super-resolution for a network that upscales."""
    name = wanted.task or (opened.config and opened.config.task) or ("sr" if opened.network.scale > 1 else None)
    if name is None:
        raise InputError(f"{opened.weights} do not tell what they restore: give --task {', '.join(TASKS)}")
    if name not in TASKS:
        raise InputError(f"there is no task {name}: choose one of {', '.join(TASKS)}")
    if (TASKS[name].scale == 1) != (opened.network.scale == 1):
        raise InputError(f"--task {name} is not for a network of scale {opened.network.scale}")
    return TASKS[name]


def chosen_protocol(opened: Source, wanted: Wanted, task: Task) -> Protocol:
    own = opened.config.val.protocol if opened.config and opened.config.task == task.name else None
    name = wanted.protocol or own or (task.grey_protocol if opened.grey else task.protocol)
    if name not in PROTOCOLS:
        raise InputError(f"there is no protocol {name}: choose one of {', '.join(PROTOCOLS)}")
    if opened.grey and not PROTOCOLS[name].grey:
        raise InputError(f"--protocol {name} is for colour images, but the network restores grey ones")
    return PROTOCOLS[name]


def chosen_degradation(opened: Source, wanted: Wanted, task: Task) -> AnyDegradation | None:
    if wanted.degradation is None:
        same = opened.config is not None and opened.config.task == task.name
        return opened.config.data.degradation if opened.config and same else task.degradation
    try:
        degradation = Data.model_validate({"degradation": yaml.safe_load(wanted.degradation)}).degradation
    except (yaml.YAMLError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is no YAML"
        known = ", ".join(kind.model_fields["name"].default for kind in get_args(get_args(AnyDegradation)[0]))
        raise InputError(
            f"--degradation {wanted.degradation}: {why}; write it as in a config, e.g. '{{name: noise, sigma: 15}}'; known: {known}"
        ) from None
    scale = opened.network.scale
    if degradation is not None and scale > 1 and not isinstance(degradation, Bicubic):
        raise InputError(
            f"--degradation {wanted.degradation}: {degradation.name} keeps the size of an image, but the network's scale is {scale}: "
            "take bicubic, or give the inputs with --lq"
        )
    return degradation


def chosen_tile(opened: Source, wanted: Wanted) -> int | None:
    own = opened.config.val.tile if opened.config else None
    return own if wanted.tile is None else wanted.tile or None


def chosen_sets(opened: Source, wanted: Wanted, task: Task) -> dict[str, ValSet]:
    """The sets by name: what was asked for, those of the run, or the photographs."""
    if wanted.data or opened.config is None:
        return given_sets(wanted)
    if wanted.lq is not None:
        raise InputError(f"--lq {wanted.lq}: give the ground truths too, with --data")
    anew = wanted.degradation is not None or opened.config.task != task.name
    made: dict[str, None] = {"lq": None, "degradation": None} if anew else {}
    return {entry.name: entry.model_copy(update=made) for entry in opened.config.data.val}


def given_sets(wanted: Wanted) -> dict[str, ValSet]:
    """Called the NAME of NAME=PLACE, else the end of the place's path, as long as tells it from the other places."""
    given = [text.partition("=") for text in wanted.data or [PHOTOS]]
    places = [place if equals else text for text, equals, place in given]
    absent = [place for place in places if place != PHOTOS and not Path(place).exists()]
    if absent:
        split = any(equals for _, equals, _ in given)
        hint = " (what stands before = is the set's name: give name=path where a path has one)" if split else ""
        raise InputError([f"--data {place}: there is no folder or image {place}{hint}" for place in absent])
    paths = [Path(place).resolve() for place in places]
    names = [
        name if equals else shortest_end(path, paths) for (name, equals, _), path in zip(given, paths, strict=True)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError([f"--data: two sets are called {name}: give each a name, --data NAME=PLACE" for name in twice])
    lq = None if wanted.lq is None else str(wanted.lq)
    # A name in a table may hold what one in a config, which becomes a folder, may not: the set itself needs none.
    kept = {"name": "eval", "lq": lq, "lq_template": wanted.lq_template}
    return {name: ValSet.model_validate(kept | {"gt": place}) for name, place in zip(names, places, strict=True)}


def shortest_end(path: Path, paths: Sequence[Path]) -> str:
    """The last parts of a path, without an image's extension: as few as no other of the paths ends with."""
    others = [other.parts for other in paths if other != path]
    counts = range(1, len(path.parts))
    fewest = next((n for n in counts if all(other[-n:] != path.parts[-n:] for other in others)), len(path.parts))
    end = Path(*path.parts[-fewest:])
    return str(end.with_suffix("") if path.is_file() else end)


def print_measured(measured: dict[str, Any], *, as_json: bool) -> None:
    """A table on the terminal, or JSON."""
    if as_json:
        print(to_json(measured, indent=1))
        return
    options = ", ".join(f"{key} {value}" for key, value in measured["options"].items())
    console, worse = plain_console(), measured["baseline"]
    console.print(f"{measured['weights']}: {measured['arch']} ({options})", highlight=False, soft_wrap=True)
    console.print(measured["protocol_text"], highlight=False, soft_wrap=True)
    metrics = [name for name in next(iter(measured["sets"].values()))["network"] if name != "per_image"]
    heads = [head for metric in metrics for head in (f"{worse} {metric.upper()}", metric.upper())]
    table = Table("set", "image", *heads)
    for name, scores in measured["sets"].items():
        before, after = scores[worse], scores["network"]
        rows = [(image, before["per_image"][image], after["per_image"][image]) for image in after["per_image"]]
        for image, old, new in [*rows, ("mean", before, after)]:
            shown = (f"{score[m]:.{DIGITS.get(m, 2)}f}" for m in metrics for score in (old, new))
            table.add_row(name, image, *shown)
    print_whole(console, table)
