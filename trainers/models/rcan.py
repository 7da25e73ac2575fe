"""RCAN, residual channel attention network for super-resolution (Zhang et al., ECCV 2018, section 3).

EDSR's head and tail around residual groups, each a chain of residual blocks with channel attention inside a skip. Key names
are those of the authors' release: head.0, body.G.body.B.body.{0, 2, 3.conv_du.0, 3.conv_du.2}, tail.0.K, tail.1, sub_mean, add_mean.

Parameters at scale 4: 15,592,355 (published as 15.59 M). The 24 numbers of sub_mean and add_mean are constants: buffers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import DIV2K_MEAN, MeanShift, conv1x1, conv3x3, thirds, upsampler, upsampler_scale


class RCANOptions(NetworkOptions):
    """Size of an RCAN."""

    scale: Literal[1, 2, 3, 4, 8] = 4
    """Upsampling factor; 1 leaves the upsampler out."""
    features: Count = 64
    """Channels of the body."""
    groups: Count = 10
    """Residual groups."""
    blocks: Count = 20
    """Residual channel attention blocks of a group."""
    attention_features: Count = 4
    """Channels inside the channel attention (published: a sixteenth of the body's)."""
    pixel_range: Literal[1, 255] = 1
    """Range of pixels inside the network: 255 for the authors' checkpoints. In and out: always [0, 1]."""


class ChannelAttention(nn.Module):
    """x * sigmoid(two 1x1 convolutions of the channels' means): equations 6 and 7."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(conv1x1(features, inner), nn.ReLU(), conv1x1(inner, features), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        weighted: Tensor = x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))
        return weighted


class Residual(nn.Module):
    """x + body(x): a block, and a group of blocks."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.body(x)
        return added


class RCAN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clipped."""

    def __init__(self, options: RCANOptions) -> None:
        super().__init__()
        features, pixel_range = options.features, float(options.pixel_range)

        def block() -> Residual:
            attention = ChannelAttention(features, options.attention_features)
            return Residual(conv3x3(features, features), nn.ReLU(), conv3x3(features, features), attention)

        def group() -> Residual:
            return Residual(*[block() for _ in range(options.blocks)], conv3x3(features, features))

        mean = [pixel_range * colour for colour in DIV2K_MEAN]
        self.pixel_range = pixel_range
        self.sub_mean = MeanShift([-colour for colour in mean], gain=pixel_range)
        self.head = nn.Sequential(conv3x3(3, features))
        self.body = nn.Sequential(*[group() for _ in range(options.groups)], conv3x3(features, features))
        self.tail = nn.Sequential(upsampler(options.scale, features), conv3x3(features, 3))
        self.add_mean = MeanShift(mean, gain=1.0)

    def forward(self, image: Tensor) -> Tensor:
        shallow = self.head(self.sub_mean(image))
        restored: Tensor = self.add_mean(self.tail(self.body(shallow) + shallow))
        return restored / self.pixel_range


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> RCANOptions:
    """The options of the RCAN whose state dict this is: the inverse of construction."""
    block = "body.0.body.0.body"
    squeeze = f"{block}.3.conv_du.0.weight"
    require(state_dict, "RCAN", "head.0.weight", f"{block}.0.weight", squeeze, "tail.1.weight", "sub_mean.bias")
    features = state_dict["head.0.weight"].shape[0]
    return RCANOptions.model_validate(
        {
            "scale": upsampler_scale(state_dict, "tail.0", features),
            "features": features,
            "groups": count(state_dict, r"body\.(\d+)\.body\."),
            "blocks": count(state_dict, r"body\.0\.body\.(\d+)\.body\."),
            "attention_features": state_dict[squeeze].shape[0],
            "pixel_range": 255 if state_dict["sub_mean.bias"].abs().max() > 1 else 1,
        }
    )


def natural_taps(options: RCANOptions) -> dict[str, str]:
    """The thirds of the body: t1 and t2 after the groups nearest to 1/3 and 2/3, t3 before the global skip."""
    first, second = thirds(options.groups)
    return {"t1": f"body.{first}", "t2": f"body.{second}", "t3": f"body.{options.groups}"}


RCAN_ENTRY = ModelEntry(
    name="rcan",
    title="RCAN",
    constructor=RCAN,
    options=RCANOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    scale=lambda options: options.scale,
    pixel_range=lambda options: options.pixel_range,
)
