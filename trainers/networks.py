"""Builds the networks of a config, and runs them on images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trainers import architectures
from trainers.architectures import Network
from trainers.errors import InputError
from trainers.fields import TEACHER
from trainers.inference import Tiled
from trainers.models import ModelEntry
from trainers.pretrained import nearest, noted, read_weights, recognise

Placed = TypeVar("Placed", bound=nn.Module)


def build_network(network: Network, role: str) -> nn.Module:
    """The network, freshly initialised from torch's global random state or with its weights.

    Raises:
        InputError: weights that cannot be read or do not fit.
    """
    entry, options = architectures.entry(network), architectures.options(network)
    built = entry.build(options)
    if network.weights is not None:
        try:
            state_dict = read_weights(network.weights)
            known = noted(network.weights)
        except InputError as error:
            raise InputError([f"{role}.weights: {problem}" for problem in error.problems]) from None
        try:
            built.load_state_dict(state_dict)
        except RuntimeError:
            raise InputError(f"{role}.weights: {network.weights} {misfit(network, state_dict, built, known)}") from None
    return built


def placed(module: Placed, device: torch.device, channels_last: bool) -> Placed:
    """The module on a device, with weights in the memory layout of train.channels_last; in place."""
    module.to(device)
    # The keyword is missing from torch's type of Module.to.
    return module.to(memory_format=torch.channels_last) if channels_last else module  # type: ignore[call-overload]


def tap_paths(network: Network) -> dict[str, str]:
    """Tap name -> module path."""
    if isinstance(network.taps, dict):
        return dict(network.taps)
    paths: dict[str, str] = architectures.entry(network).natural_taps(architectures.options(network))
    return paths


def misfit(
    network: Network, state_dict: Mapping[str, Tensor], built: nn.Module, known: tuple[ModelEntry[Any], Any] | None
) -> str:
    """Why a state dict, of a known network or not, does not fit a network."""
    entry = architectures.entry(network)
    try:
        found = known[1] if known and known[0] is entry else entry.options_from_state_dict(state_dict)
    except ValueError as error:
        return f"does not fit {network.arch}: {error}; {_whose(state_dict)}"
    given, needed = disagreement(found, architectures.options(network))
    if given:
        return f"has {given}, but the config says {needed}: change one of them"
    names = set(state_dict) ^ set(built.state_dict())
    return f"does not fit {network.arch}: keys that only one of them has: {', '.join(sorted(names)[:5])}"


def disagreement(found: Any, wanted: Any) -> tuple[str, str]:
    """The options that two sets of options do not agree about, as each has them; empty where they agree."""
    differing = [name for name in type(wanted).model_fields if getattr(found, name) != getattr(wanted, name)]
    given, needed = (", ".join(f"{name} {getattr(each, name)}" for name in differing) for each in (found, wanted))
    return given, needed


def overruled(network: Network) -> str:
    """What the weights were trained with and a config says otherwise, though they load; empty where they agree or do not tell.

    Raises:
        InputError: weights that cannot be read.
    """
    known = None if network.weights in (None, TEACHER) else noted(network.weights)
    if known is None or known[0] is not architectures.entry(network):
        return ""
    given, needed = disagreement(known[1], architectures.options(network))
    return given and f"{network.weights} was trained with {given}; taken is {needed}, as the config says"


def _whose(state_dict: Mapping[str, Tensor]) -> str:
    try:
        return f"it is weights of {recognise(state_dict)[0].title}"
    except InputError:
        return nearest(state_dict)


def network_of_weights(
    state_dict: Mapping[str, Tensor], known: tuple[ModelEntry[Any], Any] | None = None, source: str = ""
) -> tuple[ModelEntry[Any], Any, nn.Module]:
    """(registry entry, options, network with these weights), recognised by keys and shapes where it is not known.

    Raises:
        InputError: no network of ours has such a state dict.
    """
    entry, options = known or recognise(state_dict, source)
    network = entry.build(options)
    try:
        network.load_state_dict(state_dict)
    except RuntimeError as error:
        raise InputError(f"these weights look like {entry.title}, but do not load: {error}") from None
    return entry, options, network


def any_size(network: Network, built: nn.Module, tile: int | None = None) -> AnySize | Tiled:
    """The built network of a config, for images of any size; tile by tile if asked."""
    whole = AnySize(built, architectures.entry(network), architectures.options(network))
    return whole if tile is None else whole.in_tiles(tile)


class AnySize(nn.Module):
    """A network on images of any size: padded at the bottom and right as the network needs, its output cropped.

    Padding mirrors the image without its edge; where the image is too small for that, its edge is repeated.
    """

    def __init__(self, network: nn.Module, entry: ModelEntry[Any], options: Any) -> None:
        super().__init__()
        self.network = network
        self.scale = entry.scale(options)
        self.multiple_of = entry.multiple_of(options)
        self.least_side = entry.least_side(options)

    def in_tiles(self, tile: int) -> Tiled:
        """It restores tiles of tile x tile input pixels. ValueError for a tile that does not fit the network."""
        return Tiled(self, tile, scale=self.scale, multiple_of=self.multiple_of)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        missing = [
            -(-max(side, self.least_side) // self.multiple_of) * self.multiple_of - side for side in (height, width)
        ]
        if not any(missing):
            whole: Tensor = self.network(image)
            return whole
        mode = "reflect" if missing[0] < height and missing[1] < width else "replicate"
        padded = pad(image, (0, missing[1], 0, missing[0]), mode=mode)
        restored: Tensor = self.network(padded)
        return restored[..., : height * self.scale, : width * self.scale]
