"""Files of weights: reading them, and telling whose they are."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainers.errors import InputError
from trainers.fields import BUILTIN
from trainers.models import MODELS, ModelEntry

WEIGHTS = Path(__file__).parent / "weights"
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict")  # where other trainers put the state dict
PARALLEL = "module."  # what torch's DataParallel puts before every key


def read_weights(source: str) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, a checkpoint folder (its EMA), or shipped with the package (builtin:NAME).

    Raises:
        InputError: there is no such file, or it holds no state dict.
    """
    path = weights_path(source)
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise many types for a broken file
        raise InputError(f"{path}: cannot be read as weights: {why_unreadable(error)}") from None
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path}: holds no state dict (names and tensors)")
    if all(key.startswith(PARALLEL) for key in loaded):
        loaded = {key.removeprefix(PARALLEL): value for key, value in loaded.items()}
    return dict(loaded)


def why_unreadable(error: Exception) -> str:
    """In our words where torch's advise to load the file with weights_only=False, which runs whatever code is in it."""
    if not isinstance(error, pickle.UnpicklingError):
        return (str(error) or "it is empty or was cut short").splitlines()[0]
    if "Unsupported global" in str(error):
        return "it holds Python objects besides tensors, which may run code: save its state_dict() alone"
    return "it is no file of torch.save: give a .safetensors or .pth file"


def weights_path(source: str) -> Path:
    """The file behind the `weights` of a config."""
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        path = WEIGHTS / f"{name}.safetensors"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))) or "none"
            raise InputError(f"no weights called {name} ship with this package; known: {known}")
        return path
    path = Path(source)
    if path.is_dir():
        averaged = path / "ema.safetensors"
        path = averaged if averaged.is_file() else path / "student.safetensors"
    if not path.is_file():
        raise InputError(f"{source}: there are no weights: give a .safetensors or .pth file, or a checkpoint folder")
    return path


def recognise(state_dict: Mapping[str, Tensor]) -> tuple[ModelEntry[Any], Any]:
    """(registry entry, options) of the network that has this state dict.

    Raises:
        InputError: no network of ours has such keys; it names the nearest.
    """
    for entry in MODELS.values():
        try:
            return entry, entry.options_from_state_dict(state_dict)
        except ValueError:
            continue
    raise InputError(f"these weights fit none of our networks ({', '.join(MODELS)}): {nearest(state_dict)}")


def nearest(state_dict: Mapping[str, Tensor]) -> str:
    """A sentence about the network whose key names are most like these, numbers in them apart."""
    given = _without_numbers(state_dict)
    shares = {name: len(given & known) / len(given | known) for name, known in _known_names().items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] == 0:
        return "no key has a name like theirs"
    return f"they look most like {MODELS[best].title} ({shares[best]:.0%} of the key names agree)"


@cache
def _known_names() -> dict[str, set[str]]:
    with torch.device("meta"):
        return {name: _without_numbers(entry.build(entry.options()).state_dict()) for name, entry in MODELS.items()}


def _without_numbers(keys: Iterable[str]) -> set[str]:
    """Key names with # for every number: body.#.weight."""
    return {re.sub(r"\d+", "#", key) for key in keys}
