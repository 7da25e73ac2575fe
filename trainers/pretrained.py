"""Files of weights: reading them, and telling whose they are."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import safe_open
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
    if path.name in ("best", "last") and path.parent.name == "checkpoints":
        checkpoint = path.with_name(path.read_text(errors="replace").strip())
        raise InputError(f"{source}: is a text file that names a checkpoint: give {checkpoint}")
    return path


def note(entry: ModelEntry[Any], options: Any) -> dict[str, str]:
    """The metadata of a .safetensors file that says whose weights it holds."""
    return {"arch": entry.name, "options": options.model_dump_json()}


def noted(source: str) -> tuple[ModelEntry[Any], Any] | None:
    """(registry entry, options) as the file's metadata has them, or the config of the run that it is a checkpoint of; None without either.

    Weights do not tell every option (EDSR's res_scale, SwinIR's pixel_range, Uformer's train_size).

    Raises:
        InputError: there are options that this version does not know.
    """
    path = weights_path(source).resolve()
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            found, where = file.metadata() or {}, path
    except Exception:  # many types for a broken file: `read_weights` says what is wrong with it
        return None
    if not {"arch", "options"} <= found.keys():
        found, where = _run_student(path), path.parent.parent.parent / "config.yaml"
    entry = MODELS.get(found.get("arch", ""))
    if entry is None:
        return None
    try:
        return entry, entry.options.model_validate_json(found["options"])
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InputError(
            f"{where}: its options of {entry.title} are not those of this version ({wrong}): use the one that wrote it"
        ) from None


def _run_student(path: Path) -> dict[str, str]:
    """The same as `note` for <run>/checkpoints/<step>/<file>, from the run's config; empty where there is none."""
    config = path.parent.parent.parent / "config.yaml"
    if path.parent.parent.name != "checkpoints" or not config.is_file():
        return {}
    try:
        tree = yaml.safe_load(config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    student = tree.get("student") if isinstance(tree, dict) else None
    if not isinstance(student, dict) or student.get("arch") not in MODELS:
        return {}
    names = MODELS[student["arch"]].options.model_fields
    options = {name: value for name, value in student.items() if name in names}
    return {"arch": student["arch"], "options": json.dumps(options)}


def recognise(state_dict: Mapping[str, Tensor], source: str = "") -> tuple[ModelEntry[Any], Any]:
    """(registry entry, options) of the network that has this state dict.

    Args:
        source: where it was read from, for the message.

    Raises:
        InputError: no network of ours has such keys; it names the nearest.
    """
    for entry in MODELS.values():
        try:
            return entry, entry.options_from_state_dict(state_dict)
        except ValueError:
            continue
    given = f"{source}: " if source else ""
    raise InputError(f"{given}these weights fit none of our networks ({', '.join(MODELS)}): {nearest(state_dict)}")


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
