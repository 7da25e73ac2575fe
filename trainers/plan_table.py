"""`kdtrain plan` on the terminal: a table for each patch, what fits, and the settings that make it fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from trainers.config import Config
from trainers.errors import InputError
from trainers.fields import parse_bytes
from trainers.plan import BACKENDS, Planned, Planner, Point, free_memory, patch_problems
from trainers.plan_images import Validated, plan_validation, tile_that_fits
from trainers.terminal import plain_console, print_whole

MIB, GIB = 2**20, 2**30


def plan_command(config: Config, memory: str | None, patches: str | None, longest: float, as_json: bool) -> bool:
    """Plan the config at each patch, and its validation, and print it; whether the first patch and validation fit somehow.

    Raises:
        InputError: a size or a patch that cannot be.
    """
    planner = Planner(config, free_memory() if memory is None else parse_bytes(memory), longest)
    console = plain_console(stderr=as_json)
    found, fits = [], []
    sides, micro = _patches(config, patches), config.data.batch // config.train.accumulate
    for patch in sides:
        points = [Point(patch, micro, config.train.recompute, backend) for backend in BACKENDS]
        planned = [planner.plan(point) for point in points]
        proposal = planner.proposal("kdops", patch)
        fits.append(proposal is not None)
        found.append(
            {"patch": patch, "plans": [_plain(plan) for plan in planned], "proposal": proposal and proposal[1]}
        )
        print_whole(console, _table(planned))
        for plan in planned:
            console.print(verdict(plan, planner.memory, planner.longest), highlight=False, soft_wrap=True)
        console.print(_proposed(proposal, planner.memory), highlight=False, soft_wrap=True)
    first = Point(sides[0], micro, config.train.recompute, "kdops")
    validated = plan_validation(planner, first)
    tiled = None if validated.peak <= planner.memory else tile_that_fits(planner, first, validated)
    console.print(validation_verdict(validated, tiled, planner.memory), highlight=False, soft_wrap=True)
    if as_json:
        validation = dataclasses.asdict(validated) | {"proposal": tiled and f"val.tile={tiled.tile}"}
        print(json.dumps({"memory": planner.memory, "patches": found, "validation": validation}, indent=1))
    return fits[0] and (tiled or validated).peak <= planner.memory


def _patches(config: Config, text: str | None) -> list[int]:
    if text is None:
        return [config.data.patch]
    try:
        patches = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--patch {text}: give sides in pixels, such as 128,256,512") from None
    wrong = [f"--patch {side}: {problem}" for side in patches for problem in patch_problems(config, side)]
    if wrong:
        raise InputError(wrong)
    return patches


def _table(planned: Sequence[Planned]) -> Table:
    point = planned[0].point
    table = Table(
        title=f"patch {point.patch}, micro-batch {point.micro}" + ", recomputed activations" * point.recompute
    )
    table.add_column("part")
    for plan in planned:
        table.add_column(f"{plan.point.backend}\nMiB\n{how(plan)}", justify="right")
        table.add_column(f"{plan.point.backend}\nms\n{how(plan)}", justify="right")
    for name in planned[0].costs.parts():
        cells = []
        for plan in planned:
            cost = plan.costs.parts()[name]
            cells += [f"{cost.peak / MIB:,.1f}", f"{cost.seconds * 1e3:,.1f}"]
        table.add_row(name, *cells)
    rows: dict[str, Callable[[Planned], int]] = {
        "weights, gradients, Adam": lambda plan: plan.costs.weights + plan.costs.trained + plan.costs.optimizer,
        "teacher features of the batch": lambda plan: plan.shared,
    }
    for name, size in rows.items():
        if any(size(plan) for plan in planned):
            table.add_row(name, *(cell for plan in planned for cell in (f"{size(plan) / MIB:,.1f}", "")))
    whole = [cell for plan in planned for cell in (f"{plan.peak / MIB:,.1f}", f"{plan.seconds * 1e3:,.1f}")]
    table.add_row("process, at its highest", *whole)
    return table


def how(plan: Planned) -> str:
    """Where a plan's figures come from."""
    return "measured" if plan.measured else "simulated"


def verdict(plan: Planned, memory: int, longest: float) -> str:
    """Whether a plan fits, with its number."""
    needs = f"{plan.point.backend}: {plan.peak / GIB:.2f} GiB ({how(plan)})"
    if plan.peak <= memory:
        unseen = (
            "" if plan.measured or plan.seconds <= longest else f", but was not run: it takes {plan.seconds:,.0f} s"
        )
        return f"{needs} fits in {memory / GIB:.2f} GiB{unseen}"
    return f"{needs} is refused: above {memory / GIB:.2f} GiB; {plan.costs.largest()}"


def _proposed(proposal: tuple[Planned, list[str]] | None, memory: int) -> str:
    if proposal is None:
        return f"no micro-batch fits in {memory / GIB:.2f} GiB, not even one sample with recomputed activations: lower data.patch"
    plan, settings = proposal
    given = " ".join(f"--set {setting}" for setting in settings)
    return f"to fit in {memory / GIB:.2f} GiB: {given} (micro-batches of {plan.point.micro}, {plan.peak / GIB:.2f} GiB simulated)"


def validation_verdict(plan: Validated, tiled: Validated | None, memory: int) -> str:
    """Whether validation fits, with its number, and what makes it fit."""
    height, width = plan.size
    how_known = "measured" if plan.measured else "simulated"
    needs = f"validation: {plan.peak / GIB:.2f} GiB ({how_known}), {plan.decoded / GIB:.2f} of it images that are kept decoded"
    if plan.peak <= memory:
        return f"{needs}, fits in {memory / GIB:.2f} GiB"
    advice = f"to fit: --set val.tile={tiled.tile} ({tiled.peak / GIB:.2f} GiB simulated)" if tiled else "no tile fits"
    return f"{needs}, is refused: above {memory / GIB:.2f} GiB; {plan.image} has {width} x {height} pixels; {advice}"


def _plain(plan: Planned) -> dict[str, Any]:
    return dataclasses.asdict(plan)
