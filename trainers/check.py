"""Everything wrong with a config and what it names, found before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from trainers import methods, networks
from trainers.architectures import Network
from trainers.config import Config, stages
from trainers.config_file import read_config
from trainers.devices import device_problems
from trainers.errors import InputError
from trainers.events import events_problems
from trainers.methods import Method, Run
from trainers.metrics import PROTOCOLS
from trainers.slicing import build_student
from trainers.taps import Adapters, Tapped, tap_problems


def check(path: Path, overrides: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(problems, notes): keys and values, images, weights, taps, what this machine lacks, all at once. Reads every image."""
    from trainers.data.sets import train_problems, val_problems

    reading = read_config(path, overrides)
    problems = list(reading.problems)
    config = reading.config
    if config is not None:
        largest = max(stage.data.patch for _, stage in stages(config))
        problems += [f"data.train: {text}" for text in train_problems(config.data, config.scale, largest)]
        for entry in config.data.val:
            found = val_problems(entry, config.scale, PROTOCOLS[config.val.protocol])
            problems += [f"data.val {entry.name}: {text}" for text in found]
        problems += network_problems(config, reading.problems) + device_problems(config.train)
        problems += events_problems() if config.train.tensorboard else []
        reading.notes += network_notes(config)
    return list(dict.fromkeys(problems)), reading.notes


def checked_config(path: Path, overrides: Sequence[str], say: Callable[[str], None]) -> Config:
    """The config of a new run; what can be checked without reading every image is.

    Raises:
        InputError: with every problem.
    """
    reading = read_config(path, overrides)
    for note in reading.notes + (network_notes(reading.config) if reading.config else []):
        say(f"note: {note}")
    problems = list(reading.problems)
    problems += network_problems(reading.config, problems) if reading.config else []
    if problems or reading.config is None:
        raise InputError(problems)
    return reading.config


def roles(config: Config) -> dict[str, Network]:
    """The networks of a config by their keys."""
    found: dict[str, Network] = {"student": config.student}
    return found if config.teacher is None else found | {"teacher": config.teacher}


def network_notes(config: Config) -> list[str]:
    """Options in which the config overrules what weights were trained with."""
    notes = []
    for role, network in roles(config).items():
        with suppress(InputError):  # said by network_problems
            said = networks.overruled(network)
            notes += [f"{role}.weights: {said}"] if said else []
    return notes


def network_problems(config: Config, known: Sequence[str]) -> list[str]:
    """Weights that do not load, taps that name no module, whose sizes disagree, or of which the method can make nothing.

    Networks are run only where nothing else is wrong, `known` included: they may not take the images of the config.
    """
    problems, tapped = [], {}
    for role, network in roles(config).items():
        try:
            built = build_student(config) if role == "student" else networks.build_network(network, role)
        except InputError as error:
            problems += error.problems
            built = networks.build_network(network.model_copy(update={"weights": None}), role)
        paths = networks.tap_paths(network)
        wrong = tap_problems(built, paths)
        problems += [f"{role}.taps: {text}" for text in wrong]
        if not wrong:
            tapped[role] = Tapped(built, paths)
    method, wrong = described_method(config)
    problems += wrong
    if len(tapped) == 2 and not problems and not known and method is not None:
        problems += _tap_size_problems(tapped, method, config)
    return problems


def described_method(config: Config) -> tuple[Method | None, list[str]]:
    """The config's method, if it can be built, and what is wrong with the weights of its feature network and of its other teachers."""
    if config.method.refusals(Run(config.scale, config.data.patch)):
        return None, []  # said with the config
    try:
        method = methods.build(config.method)
    except InputError as error:
        return None, error.problems
    problems = []
    others = method.requirements().weights if config.teacher else {}  # that there is no teacher is said with the config
    for name, weights in others.items():
        assert config.teacher is not None
        try:
            networks.build_network(config.teacher.model_copy(update={"weights": weights}), name)
        except InputError as error:
            problems += [f"method.{name}_{problem.removeprefix(f'{name}.')}" for problem in error.problems]
    return method, problems


def first_input(config: Config) -> torch.Tensor:
    """Black, of the size that training has."""
    side = config.data.patch // config.scale
    return torch.zeros(1, 1 if config.data.grey else 3, side, side)


@torch.no_grad()
def _tap_size_problems(tapped: dict[str, Tapped], method: Method, config: Config) -> list[str]:
    image, needs = first_input(config), method.requirements()
    try:
        student, taught = (tapped[role](image)[1] for role in ("student", "teacher"))
        if needs.taps and needs.adapters:
            clean = image.new_zeros(*image.shape[:2], config.data.patch, config.data.patch)
            taught = method.targets(image, clean, dict.fromkeys(needs.teachers, tapped["teacher"]))
    except InputError as error:
        return error.problems
    try:
        Adapters(student, taught)
    except InputError as error:
        return [f"taps: {text}" for text in error.problems]
    return []
