"""DnCNN, a plain chain of convolutions that predicts the noise (Zhang et al., IEEE TIP 26(7), 2017, section III).

Convolution and ReLU, again and again, a last convolution; the image minus that is the result. Key names are those of the
KAIR release, in which batch normalisation has been merged into the convolutions: model.0, model.2, model.4 ...

Parameters: 555,137 for 17 convolutions on grey images (published as 0.56 M) and 668,227 for 20 on colour (0.67 M).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import conv3x3, thirds


class DnCNNOptions(NetworkOptions):
    """Size of a DnCNN."""

    features: Count = 64
    """Channels between the convolutions."""
    depth: int = Field(default=17, ge=2)
    """Convolutions (published: 17 for grey images of known noise, 20 for colour or unknown noise)."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""


class DnCNN(nn.Module):
    """(B, C, H, W) in [0, 1] -> the same size, not clipped; C image channels."""

    def __init__(self, options: DnCNNOptions) -> None:
        super().__init__()
        widths = [options.image_channels, *[options.features] * (options.depth - 1)]
        layers: list[nn.Module] = []
        for inputs in widths[:-1]:
            layers += [conv3x3(inputs, options.features), nn.ReLU()]
        self.model = nn.Sequential(*layers, conv3x3(options.features, options.image_channels))

    def forward(self, image: Tensor) -> Tensor:
        restored: Tensor = image - self.model(image)
        return restored


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> DnCNNOptions:
    """The options of the DnCNN whose state dict this is: the inverse of construction."""
    require(state_dict, "DnCNN", "model.0.weight", "model.2.weight")
    foreign = [key for key in state_dict if not re.fullmatch(r"model\.\d+\.(weight|bias)", key)]
    if foreign:
        raise ValueError(f"not a state dict of DnCNN: it has {', '.join(foreign[:3])}")
    features, image_channels = state_dict["model.0.weight"].shape[:2]
    depth = count(state_dict, r"model\.(\d+)\.")
    return DnCNNOptions(features=features, depth=depth, image_channels=1 if image_channels == 1 else 3)


def natural_taps(options: DnCNNOptions) -> dict[str, str]:
    """The thirds of the chain, behind their ReLUs; t3 is what the last convolution gets."""
    first, second = thirds(options.depth - 1)
    return {"t1": f"model.{2 * first + 1}", "t2": f"model.{2 * second + 1}", "t3": f"model.{2 * options.depth - 3}"}


DNCNN_ENTRY = ModelEntry(
    name="dncnn",
    title="DnCNN",
    constructor=DnCNN,
    options=DnCNNOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    image_channels=lambda options: options.image_channels,
)
