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
from trainers.models.dncnn import DNCNN_ENTRY
from trainers.models.edsr import EDSR_ENTRY
from trainers.models.entry import ModelEntry, NetworkOptions
from trainers.models.imdn import IMDN_ENTRY
from trainers.models.nafnet import NAFNET_ENTRY
from trainers.models.rcan import RCAN_ENTRY
from trainers.models.restormer import RESTORMER_ENTRY
from trainers.models.rlfn import RLFN_ENTRY
from trainers.models.swinir import SWINIR_ENTRY
from trainers.models.uformer import UFORMER_ENTRY

__all__ = ["MODELS", "ModelEntry", "NetworkOptions", "find"]

# Each entry has its own type of options, so the registry as a whole is typed Any in that place.
ENTRIES: list[ModelEntry[Any]] = [
    DNCNN_ENTRY,
    EDSR_ENTRY,
    IMDN_ENTRY,
    NAFNET_ENTRY,
    RCAN_ENTRY,
    RESTORMER_ENTRY,
    RLFN_ENTRY,
    SWINIR_ENTRY,
    UFORMER_ENTRY,
]
MODELS = {entry.name: entry for entry in ENTRIES}


def find(name: str) -> ModelEntry[Any]:
    """The entry called `name`; InputError with the closest name when there is none."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"arch {name!r} is no network of ours: use one of {', '.join(sorted(MODELS))}{hint}")
