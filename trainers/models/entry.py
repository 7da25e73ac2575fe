"""What the trainer knows of a network, besides its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class NetworkOptions(BaseModel):
    """Base of every network's options: immutable, no conversions between types, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Options = TypeVar("Options", bound=NetworkOptions)


@dataclass(frozen=True)
class ModelEntry(Generic[Options]):
    """A network in the registry."""

    name: str
    """The word for it in a config: `arch: edsr`."""

    constructor: Callable[[Options], nn.Module]
    """Makes the network; image in and out are (B, 3, H, W) in `input_range`."""

    options: type[Options]
    """The options that the constructor takes: a pydantic model."""

    options_from_state_dict: Callable[[Mapping[str, Tensor]], Options]
    """Reads the options from the keys and shapes of a checkpoint (ValueError if it is not this network's)."""

    natural_taps: Callable[[Options], dict[str, str]]
    """The usual places for feature distillation: tap name -> module path, from the shallowest to the deepest."""

    multiple_of: Callable[[Options], int]
    """The input's height and width must be multiples of this."""

    input_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest pixel value that the network expects."""

    def build(self, options: Options) -> nn.Module:
        """The network with these options, freshly initialised from torch's global random state."""
        return self.constructor(options)
