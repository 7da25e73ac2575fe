"""EDSR, the enhanced deep residual network for super-resolution (Lim et al., CVPR Workshops 2017, section 3).

A 3x3 convolution (head), residual blocks without normalisation and a last convolution (body) inside one global skip,
then pixel shuffles and a 3x3 convolution (tail). Key names are those of the authors' PyTorch release: head.0,
body.N.body.0, body.N.body.2, tail.0.K, tail.1, sub_mean, add_mean; its checkpoints load with strict=True.

Parameters at scale 2, weights and biases of all convolutions: 1,369,859 for 64 features x 16 blocks (published as
1.37 M) and 40,729,603 for 256 x 32 (published as 40.7 M). The 24 numbers of sub_mean and add_mean are constants:
buffers here, not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import DIV2K_MEAN, MeanShift, conv3x3, thirds, upsampler, upsampler_scale


class EDSROptions(NetworkOptions):
    """Size of an EDSR."""

    scale: Literal[1, 2, 3, 4, 8] = 2
    """Upsampling factor; 1 leaves the upsampler out."""
    features: Count = 64
    """Channels of the body."""
    blocks: Count = 16
    """Residual blocks."""
    res_scale: float = Field(default=1.0, gt=0)
    """Factor on each block's residual (the paper: 0.1 for 256 features)."""
    pixel_range: Literal[1, 255] = 1
    """Range of pixels inside the network: 255 for the authors' checkpoints. In and out: always [0, 1]."""


class ResidualBlock(nn.Module):
    """x + res_scale * conv(relu(conv(x)))."""

    def __init__(self, features: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv3x3(features, features), nn.ReLU(inplace=True), conv3x3(features, features))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.body(x)
        return x + residual if self.res_scale == 1.0 else x + residual * self.res_scale


class EDSR(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clipped."""

    def __init__(self, options: EDSROptions) -> None:
        super().__init__()
        features, pixel_range = options.features, float(options.pixel_range)
        mean = [pixel_range * colour for colour in DIV2K_MEAN]
        self.pixel_range = pixel_range
        self.sub_mean = MeanShift([-colour for colour in mean], gain=pixel_range)
        self.head = nn.Sequential(conv3x3(3, features))
        blocks = [ResidualBlock(features, options.res_scale) for _ in range(options.blocks)]
        self.body = nn.Sequential(*blocks, conv3x3(features, features))
        self.tail = nn.Sequential(upsampler(options.scale, features), conv3x3(features, 3))
        self.add_mean = MeanShift(mean, gain=1.0)

    def forward(self, image: Tensor) -> Tensor:
        shallow = self.head(self.sub_mean(image))
        # Out of place: an addition into the body's output would also change the tap on the body's last convolution.
        deep = self.body(shallow) + shallow
        restored: Tensor = self.add_mean(self.tail(deep))
        return restored if self.pixel_range == 1.0 else restored / self.pixel_range


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> EDSROptions:
    """The options of the EDSR whose state dict this is: the inverse of construction.

    Weights do not tell res_scale; it is taken as in the paper: 0.1 from 256 features on, 1.0 below.
    """
    require(state_dict, "EDSR", "head.0.weight", "body.0.body.0.weight", "tail.1.weight", "sub_mean.bias")
    features = state_dict["head.0.weight"].shape[0]
    return EDSROptions.model_validate(
        {
            "scale": upsampler_scale(state_dict, "tail.0", features),
            "features": features,
            "blocks": count(state_dict, r"body\.(\d+)\.body\."),
            "res_scale": 0.1 if features >= 256 else 1.0,
            "pixel_range": 255 if state_dict["sub_mean.bias"].abs().max() > 1 else 1,
        }
    )


def natural_taps(options: EDSROptions) -> dict[str, str]:
    """The thirds of the body: t1 and t2 after the blocks nearest to 1/3 and 2/3, t3 after the last convolution.

    t3 is the tensor that enters the global skip, before the addition (FACD's framework figure).
    """
    first, second = thirds(options.blocks)
    return {"t1": f"body.{first}", "t2": f"body.{second}", "t3": f"body.{options.blocks}"}


EDSR_ENTRY = ModelEntry(
    name="edsr",
    title="EDSR",
    constructor=EDSR,
    options=EDSROptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    scale=lambda options: options.scale,
    pixel_range=lambda options: options.pixel_range,
)
