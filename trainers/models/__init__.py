"""The networks that can be teachers and students, by name.

A network is one file: an `nn.Module` built of plain ops, with the state-dict key names of its published checkpoints,
and the `ModelEntry` that describes it. `MODELS` lists them:

    entry = find("edsr")
    options = entry.options(scale=2, features=16, blocks=4)
    network = entry.build(options)
    entry.options_from_state_dict(network.state_dict()) == options
"""

from __future__ import annotations

import difflib
from typing import Any

from trainers.errors import InputError
from trainers.models.edsr import EDSR_ENTRY
from trainers.models.entry import ModelEntry, NetworkOptions

__all__ = ["MODELS", "ModelEntry", "NetworkOptions", "find"]

# Each entry has its own type of options, so the registry as a whole is typed Any in that place.
MODELS: dict[str, ModelEntry[Any]] = {entry.name: entry for entry in [EDSR_ENTRY]}


def find(name: str) -> ModelEntry[Any]:
    """The entry called `name`; InputError with the closest name when there is none."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"arch {name!r} is no network of ours: use one of {', '.join(sorted(MODELS))}{hint}")
