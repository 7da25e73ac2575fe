"""The network block of a config: one class per architecture, chosen by `arch`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from trainers.errors import InputError
from trainers.fields import TEACHER, Auto, PathText, Section, absolute, shape_of
from trainers.models import MODELS, ModelEntry, NetworkOptions
from trainers.models.dncnn import DnCNNOptions
from trainers.models.edsr import EDSROptions
from trainers.models.imdn import IMDNOptions
from trainers.models.nafnet import NAFNetOptions
from trainers.models.rcan import RCANOptions
from trainers.models.restormer import RestormerOptions
from trainers.models.rlfn import RLFNOptions
from trainers.models.swinir import SwinIROptions
from trainers.models.uformer import UformerOptions
from trainers.pretrained import note, noted, read_weights, recognise

TapName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Taps = Annotated[Auto | Annotated[dict[TapName, str], Tag("mapping")], shape_of("auto or {name: module.path, ...}")]


class NetworkFields(Section):
    """What every network may be given besides its own options."""

    weights: PathText | None = None
    """Weights to start from: a file, a checkpoint folder, builtin:NAME, teacher (a slice of it), or null. Files tell what is left out."""
    taps: Taps = "auto"
    """Where features are taken for distillation: auto (the network's usual places) or tap name -> module path."""


class DnCNNNetwork(DnCNNOptions, NetworkFields):
    """A DnCNN."""

    arch: Literal["dncnn"]
    """The network."""


class EDSRNetwork(EDSROptions, NetworkFields):
    """An EDSR."""

    arch: Literal["edsr"]
    """The network."""


class IMDNNetwork(IMDNOptions, NetworkFields):
    """An IMDN."""

    arch: Literal["imdn"]
    """The network."""


class NAFNetNetwork(NAFNetOptions, NetworkFields):
    """A NAFNet."""

    arch: Literal["nafnet"]
    """The network."""


class RCANNetwork(RCANOptions, NetworkFields):
    """An RCAN."""

    arch: Literal["rcan"]
    """The network."""


class RestormerNetwork(RestormerOptions, NetworkFields):
    """A Restormer."""

    arch: Literal["restormer"]
    """The network."""


class RLFNNetwork(RLFNOptions, NetworkFields):
    """An RLFN."""

    arch: Literal["rlfn"]
    """The network."""


class SwinIRNetwork(SwinIROptions, NetworkFields):
    """A SwinIR."""

    arch: Literal["swinir"]
    """The network."""


class UformerNetwork(UformerOptions, NetworkFields):
    """A Uformer."""

    arch: Literal["uformer"]
    """The network."""


Network = Annotated[
    DnCNNNetwork
    | EDSRNetwork
    | IMDNNetwork
    | NAFNetNetwork
    | RCANNetwork
    | RestormerNetwork
    | RLFNNetwork
    | SwinIRNetwork
    | UformerNetwork,
    Field(discriminator="arch"),
]


def entry(network: Network) -> ModelEntry[Any]:
    """The registry's entry of a network."""
    return MODELS[network.arch]


def options(network: Network) -> NetworkOptions:
    """The options of the network's constructor."""
    chosen: NetworkOptions = entry(network).options.model_validate(
        {name: getattr(network, name) for name in entry(network).options.model_fields}
    )
    return chosen


def metadata(network: Network) -> dict[str, str]:
    """What its files of weights say beside the tensors."""
    return note(entry(network), options(network))


def has_scale(arch: Any) -> bool:
    """Whether a network can upscale; the others keep the size of an image."""
    return arch in MODELS and "scale" in MODELS[arch].options.model_fields


def described(block: dict[str, Any], scale: int, base: str) -> dict[str, Any]:
    """A network's block with what it leaves out: arch and options as its file of weights tells them, else the run's scale.

    Weights that cannot be read, or are no network's, add nothing: they are reported where they are loaded.

    Args:
        block: as written in the config.
        scale: the run's.
        base: the folder that relative paths are relative to.
    """
    try:
        told = _told(block, base)
    except InputError:
        told = {}
    arch = block.get("arch", told.get("arch"))
    run = {"scale": scale} if has_scale(arch) else {}
    return told | run | block


def untold(block: dict[str, Any], base: str) -> str | None:
    """Why the weights of a block without arch do not tell it; None for a block without a file of weights."""
    try:
        _told(block, base)
    except InputError as error:
        return "; ".join(error.problems)
    return None


def _told(block: dict[str, Any], base: str) -> dict[str, Any]:
    """arch and options as the block's file of weights tells them; nothing where another arch is given.

    Raises:
        InputError: weights that cannot be read, or are no network's.
    """
    if not isinstance(block.get("weights"), str) or block["weights"] == TEACHER:
        return {}
    source = absolute(block["weights"], base)
    state_dict = read_weights(source)
    found, chosen = noted(source) or recognise(state_dict, source)
    if block.get("arch", found.name) != found.name:
        return {}
    told: dict[str, Any] = {"arch": found.name} | chosen.model_dump()
    return told
