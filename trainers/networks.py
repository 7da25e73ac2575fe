"""Builds the networks of a config and reads their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainers import config
from trainers.errors import InputError
from trainers.fields import BUILTIN
from trainers.models import MODELS

WEIGHTS = Path(__file__).parent / "weights"


def build_network(network: config.Network, role: str) -> nn.Module:
    """The network, freshly initialised from torch's global random state or with its weights.

    Raises:
        InputError: weights that cannot be read or do not fit.
    """
    entry, options = config.entry(network), config.options(network)
    built = entry.build(options)
    if network.weights is not None:
        try:
            state_dict = read_weights(network.weights)
        except InputError as error:
            raise InputError([f"{role}.weights: {problem}" for problem in error.problems]) from None
        try:
            built.load_state_dict(state_dict)
        except RuntimeError:
            raise InputError(f"{role}.weights: {network.weights} {misfit(network, state_dict, built)}") from None
    return built


def tap_paths(network: config.Network) -> dict[str, str]:
    """Tap name -> module path."""
    if isinstance(network.taps, dict):
        return dict(network.taps)
    paths: dict[str, str] = config.entry(network).natural_taps(config.options(network))
    return paths


def misfit(network: config.Network, state_dict: Mapping[str, Tensor], built: nn.Module) -> str:
    """Why a state dict does not fit a network."""
    try:
        found = config.entry(network).options_from_state_dict(state_dict)
    except ValueError as error:
        return f"does not fit {network.arch}: {error}"
    wanted = config.options(network)
    differing = [name for name in type(wanted).model_fields if getattr(found, name) != getattr(wanted, name)]
    if differing:
        given = ", ".join(f"{name} {getattr(found, name)}" for name in differing)
        needed = ", ".join(f"{name} {getattr(wanted, name)}" for name in differing)
        return f"has {given}, but the config says {needed}: change one of them"
    names = set(state_dict) ^ set(built.state_dict())
    return f"does not fit {network.arch}: keys that only one of them has: {', '.join(sorted(names)[:5])}"


def network_of_weights(state_dict: Mapping[str, Tensor]) -> tuple[str, Any, nn.Module]:
    """(arch, options, network with these weights), recognised by keys and shapes.

    Raises:
        InputError: no network of ours has such a state dict.
    """
    for name, entry in MODELS.items():
        try:
            options = entry.options_from_state_dict(state_dict)
            network = entry.build(options)
            network.load_state_dict(state_dict)
        except (ValueError, RuntimeError):
            continue
        return name, options, network
    raise InputError(f"these weights fit none of our networks ({', '.join(MODELS)})")


def read_weights(source: str) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, a checkpoint folder (its EMA), or shipped with the package (builtin:NAME).

    Raises:
        InputError: there is no such file, or it holds no state dict.
    """
    path = weights_path(source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise many types for a broken file
        raise InputError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from None
    for wrapper in ("params_ema", "params", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path}: holds no state dict (names and tensors)")
    return loaded


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
