"""What a step of each compared method costs: measured once, alone on the machine, and kept beside the comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.errors import InputError
from trainers.files import replace_file

if TYPE_CHECKING:
    from trainers.config import Config
    from trainers.plan import Measured

FILE = "costs.json"


def measure_costs(configs: Mapping[str, Config], folder: Path) -> None:
    """Runs two steps of each config that <folder>/costs.json lacks, each in a process of its own, and adds what they took.

    What cannot be measured is left out.
    """
    from trainers.plan import Point, measure_in_child

    found = read_costs(folder)
    for label, config in configs.items():
        if label in found:
            continue
        micro = config.data.batch // config.train.accumulate
        try:
            found[label] = measure_in_child(config, Point(config.data.patch, micro, config.train.recompute, "kdops"))
        except InputError:
            continue
        plain = {name: dataclasses.asdict(measured) for name, measured in found.items()}
        replace_file(folder / FILE, (json.dumps(plain, indent=1) + "\n").encode())


def read_costs(folder: Path) -> dict[str, Measured]:
    """Label -> what was measured; empty where nothing was."""
    from trainers.plan import measured_from

    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return {label: measured_from(plain) for label, plain in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): remove it, and its costs are measured again") from None
