"""What a feature network is: a frozen network that turns an image into maps, from shallow to deep, and a latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainers.errors import InputError
from trainers.fields import BUILTIN, PathText, Section
from trainers.pretrained import read_weights, weights_path


class FeatureOptions(Section):
    """Base of every feature network's options."""

    source: ClassVar[str]
    """Where its weights are published."""
    multiple_of: ClassVar[int] = 1
    """Sides of an image must be multiples of this."""
    has_codebook: ClassVar[bool] = False

    weights: PathText | None = None
    """The file of its weights, which must be there already: nothing is downloaded."""

    def problems(self, side: int) -> list[tuple[str, str]]:
        """(key, what is wrong and what to do) for square images of this side."""
        found = []
        if self.weights is None:
            found.append(("weights", f"needs its weights: give the path of a file; {self.source}"))
        elif not self.weights.startswith(BUILTIN) and not Path(self.weights).is_file():
            found.append(("weights", f"{self.weights} is not there; {self.source}"))
        if side % self.multiple_of:
            found.append(("name", f"needs patches of a multiple of {self.multiple_of} pixels, not {side}"))
        return found


class Encoded(NamedTuple):
    """What a feature network makes of images (B, 3, H, W)."""

    levels: tuple[Tensor, ...]
    """Feature maps from shallow to deep, each (B, C, H', W')."""
    latent: Tensor
    """(B, D, H / f, W / f): the last map; of networks with a codebook, what is quantised."""


class FeatureNetwork(nn.Module):
    """A frozen network inside a method: it moves with the method to its device, and into no checkpoint.

    Gradients pass through it to the image. It stays in evaluation mode.

    Args:
        network: a module image -> Encoded.
        codebook: (K, D), or None.
    """

    codebook: Tensor | None

    def __init__(self, network: nn.Module, codebook: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("codebook", codebook)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Encoded:
        # Grey images have one channel, these networks were trained on three.
        encoded: Encoded = self.network(image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image)
        return encoded

    def train(self, mode: bool = True) -> FeatureNetwork:
        return super().train(False)

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        """Nothing: its weights come from their file."""
        return named.get("destination", {})


def load(network: nn.Module, options: FeatureOptions, rename: Callable[[str], str] = str) -> None:
    """Loads the file's weights under the network's names; the file may hold more (decoders, classifiers).

    Raises:
        InputError: the file is missing, or lacks weights of this network.
    """
    for key, text in options.problems(side=0):
        raise InputError(f"method.features.{key}: {text}")
    assert options.weights is not None
    state_dict = {rename(key): value for key, value in read_tensors(options.weights).items()}
    needed = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}  # no counters
    misfits = [key for key, value in needed.items() if key not in state_dict or state_dict[key].shape != value.shape]
    if misfits:
        raise InputError(
            f"method.features.weights: {options.weights} lacks or differs in {len(misfits)} of {len(needed)} tensors "
            f"({', '.join(misfits[:3])} ...): these are no such weights; {options.source}"
        )
    network.load_state_dict({key: state_dict[key] for key in needed}, strict=False)


def read_tensors(weights: str) -> Mapping[str, Tensor]:
    """The state dict of a published file. What else is pickled in it (a trainer's callbacks) is replaced by an empty object.

    Raises:
        InputError: the file cannot be read.
    """
    path = weights_path(weights)
    if path.suffix == ".safetensors":
        return read_weights(weights)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old or broken file: the reader says which
        foreign = []
    with torch.serialization.safe_globals([(_Foreign, name) for name in foreign]):
        return read_weights(weights)


class _Foreign:
    """Stands for any class that is no tensor: takes whatever its pickle says, and does nothing with it."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass
