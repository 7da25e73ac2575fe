"""RLFN, the residual local feature network for efficient super-resolution (Kong et al., CVPR Workshops 2022, section 3).

A 3x3 convolution, residual local feature blocks, a 3x3 convolution inside a global skip, then one convolution and pixel
shuffle. Key names are those of the authors' release: conv_1, block_N.{c1_r, c2_r, c3_r, c5, esa}, conv_2, upsampler.0.
Its checkpoints expect pixels in 0-255; images in and out of this class are in [0, 1].

Parameters: 526,856 at x2 and 543,740 at x4 (published as 527 K and 544 K), 470,208 for RLFN-S at x4 (48 features).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, max_pool2d

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import conv1x1, conv3x3, thirds

PIXEL_RANGE = 255
SLOPE = 0.05  # of the leaky ReLUs


class RLFNOptions(NetworkOptions):
    """Size of an RLFN."""

    scale: Literal[2, 3, 4, 8] = 4
    """Upsampling factor."""
    features: Count = 52
    """Channels of the body (RLFN-S: 48)."""
    blocks: Count = 6
    """Residual local feature blocks."""
    esa_features: Count = 16
    """Channels inside the spatial attention."""


class SpatialAttention(nn.Module):
    """ESA: a mask from features at about a sixth of the size; the input must be at least 15 x 15."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(features, inner)
        self.conv_f = conv1x1(inner, inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv3 = conv3x3(inner, inner)
        self.conv4 = conv1x1(inner, features)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv1(x)
        coarse = self.conv3(max_pool2d(self.conv2(narrow), 7, stride=3))
        resized = interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(resized + self.conv_f(narrow)))


class LocalBlock(nn.Module):
    """RLFB: three convolutions, the input added, 1x1 convolution and attention."""

    def __init__(self, features: int, esa_features: int) -> None:
        super().__init__()
        self.c1_r = conv3x3(features, features)
        self.c2_r = conv3x3(features, features)
        self.c3_r = conv3x3(features, features)
        self.c5 = conv1x1(features, features)
        self.esa = SpatialAttention(features, esa_features)

    def forward(self, x: Tensor) -> Tensor:
        local = x
        for convolution in (self.c1_r, self.c2_r, self.c3_r):
            local = leaky_relu(convolution(local), SLOPE)
        attended: Tensor = self.esa(self.c5(x + local))
        return attended


class RLFN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clipped; H and W at least 15."""

    def __init__(self, options: RLFNOptions) -> None:
        super().__init__()
        features = options.features
        self.blocks = options.blocks
        self.conv_1 = conv3x3(3, features)
        for index in range(1, options.blocks + 1):
            self.add_module(f"block_{index}", LocalBlock(features, options.esa_features))
        self.conv_2 = conv3x3(features, features)
        self.upsampler = nn.Sequential(conv3x3(features, 3 * options.scale**2), nn.PixelShuffle(options.scale))

    def forward(self, image: Tensor) -> Tensor:
        shallow = self.conv_1(image * PIXEL_RANGE)
        x = shallow
        for index in range(1, self.blocks + 1):
            x = self.get_submodule(f"block_{index}")(x)
        restored: Tensor = self.upsampler(self.conv_2(x) + shallow) / PIXEL_RANGE
        return restored


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> RLFNOptions:
    """The options of the RLFN whose state dict this is: the inverse of construction."""
    require(
        state_dict, "RLFN", "conv_1.weight", "block_1.c1_r.weight", "block_1.esa.conv1.weight", "upsampler.0.weight"
    )
    return RLFNOptions.model_validate(
        {
            "scale": round((state_dict["upsampler.0.weight"].shape[0] / 3) ** 0.5),
            "features": state_dict["conv_1.weight"].shape[0],
            "blocks": count(state_dict, r"block_(\d+)\."),
            "esa_features": state_dict["block_1.esa.conv1.weight"].shape[0],
        }
    )


def natural_taps(options: RLFNOptions) -> dict[str, str]:
    """The thirds of the body: t1 and t2 after the blocks nearest to 1/3 and 2/3, t3 before the global skip."""
    first, second = thirds(options.blocks)
    return {"t1": f"block_{first + 1}", "t2": f"block_{second + 1}", "t3": "conv_2"}


RLFN_ENTRY = ModelEntry(
    name="rlfn",
    title="RLFN",
    constructor=RLFN,
    options=RLFNOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    scale=lambda options: options.scale,
    least_side=lambda options: 15,
    pixel_range=lambda options: PIXEL_RANGE,
)
