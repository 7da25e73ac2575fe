"""IMDN, information multi-distillation network for super-resolution, in the form of the NTIRE efficient-SR baseline.

Hui et al., ACM Multimedia 2019, section 3; the baseline of the NTIRE 2022 challenge (Li et al., CVPR Workshops 2022) has 8 blocks
without channel attention inside one global skip. Key names are the baseline's: model.0, model.1.sub.N.{conv1.0,
conv2.0, conv3.0, conv4, conv1x1}, model.2. The authors' own release has other keys and another structure, and does not load.

Parameters: 893,936 at x4 (published as 0.894 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import conv1x1, conv3x3, thirds

SLOPE = 0.05  # of the leaky ReLUs


class IMDNOptions(NetworkOptions):
    """Size of an IMDN."""

    scale: Literal[2, 3, 4, 8] = 4
    """Upsampling factor."""
    features: int = Field(default=64, ge=4, multiple_of=4)
    """Channels of the body; a quarter of them is split off at each of a block's four steps."""
    blocks: Count = 8
    """Information multi-distillation blocks."""


class DistillationBlock(nn.Module):
    """Four 3x3 convolutions; a quarter of the channels stays after each, the rest goes on; a 1x1 convolution joins the quarters."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.sizes = [features // 4, features - features // 4]  # kept, passed on
        kept, passed = self.sizes
        self.conv1 = activated(features, features)
        self.conv2 = activated(passed, features)
        self.conv3 = activated(passed, features)
        self.conv4 = conv3x3(passed, kept)
        self.conv1x1 = conv1x1(kept * 4, features)

    def forward(self, x: Tensor) -> Tensor:
        kept1, passed = self.conv1(x).split(self.sizes, dim=1)
        kept2, passed = self.conv2(passed).split(self.sizes, dim=1)
        kept3, passed = self.conv3(passed).split(self.sizes, dim=1)
        joined: Tensor = x + self.conv1x1(torch.cat([kept1, kept2, kept3, self.conv4(passed)], dim=1))
        return joined


class Skip(nn.Module):
    """x + sub(x)."""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.sub(x)
        return added


class IMDN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clipped."""

    def __init__(self, options: IMDNOptions) -> None:
        super().__init__()
        features, scale = options.features, options.scale
        blocks = [DistillationBlock(features) for _ in range(options.blocks)]
        body = nn.Sequential(*blocks, conv3x3(features, features))
        self.model = nn.Sequential(
            conv3x3(3, features), Skip(body), conv3x3(features, 3 * scale**2), nn.PixelShuffle(scale)
        )

    def forward(self, image: Tensor) -> Tensor:
        restored: Tensor = self.model(image)
        return restored


def activated(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution and leaky ReLU."""
    return nn.Sequential(conv3x3(inputs, outputs), nn.LeakyReLU(SLOPE))


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> IMDNOptions:
    """The options of the IMDN whose state dict this is: the inverse of construction."""
    require(state_dict, "IMDN", "model.0.weight", "model.1.sub.0.conv1.0.weight", "model.2.weight")
    return IMDNOptions.model_validate(
        {
            "scale": round((state_dict["model.2.weight"].shape[0] / 3) ** 0.5),
            "features": state_dict["model.0.weight"].shape[0],
            "blocks": count(state_dict, r"model\.1\.sub\.(\d+)\.conv1\."),
        }
    )


def natural_taps(options: IMDNOptions) -> dict[str, str]:
    """The thirds of the body: t1 and t2 after the blocks nearest to 1/3 and 2/3, t3 before the global skip."""
    first, second = thirds(options.blocks)
    return {"t1": f"model.1.sub.{first}", "t2": f"model.1.sub.{second}", "t3": f"model.1.sub.{options.blocks}"}


IMDN_ENTRY = ModelEntry(
    name="imdn",
    title="IMDN",
    constructor=IMDN,
    options=IMDNOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    scale=lambda options: options.scale,
)
