"""What the trainer knows of a network, besides its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class NetworkOptions(BaseModel):
    """Base of every network's options: immutable, no conversions between types, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Count = Annotated[int, Field(ge=1)]
Options = TypeVar("Options", bound=NetworkOptions)


@dataclass(frozen=True)
class ModelEntry(Generic[Options]):
    """A network in the registry. Images in and out are (B, image_channels, H, W) in [0, 1], whatever it computes in."""

    name: str
    """The word for it in a config: `arch: edsr`."""

    title: str
    """Its name as its authors write it."""

    constructor: Callable[[Options], nn.Module]
    """Makes the network."""

    options: type[Options]
    """The options that the constructor takes: a pydantic model."""

    options_from_state_dict: Callable[[Mapping[str, Tensor]], Options]
    """Reads the options from the keys and shapes of a checkpoint (ValueError if it is not this network's)."""

    natural_taps: Callable[[Options], dict[str, str]]
    """The usual places for feature distillation: tap name -> module path, in the order of the forward pass.

    Names say where a tap lies (`taps.tap_group`): enc1, enc2 ..., latent, ... dec2, dec1 in a U-shape, else t1, t2, t3.
    """

    scale: Callable[[Options], int] = lambda options: 1
    """How many times the output is higher and wider than the input; 1 restores at the same size."""

    multiple_of: Callable[[Options], int] = lambda options: 1
    """The input's height and width must be multiples of this."""

    least_side: Callable[[Options], int] = lambda options: 1
    """The input's height and width must be at least this."""

    image_channels: Callable[[Options], int] = lambda options: 3
    """3 for colour, 1 for grey."""

    pixel_range: Callable[[Options], int] = lambda options: 1
    """Largest pixel value inside the network, 1 or 255: the network itself converts from and to [0, 1]."""

    def build(self, options: Options) -> nn.Module:
        """The network with these options, freshly initialised from torch's global random state."""
        return self.constructor(options)
