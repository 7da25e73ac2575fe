"""What several networks share."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from trainers.models.keys import count

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of DIV2K's training images, pixels in [0, 1]


def conv1x1(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def depthwise3x3(channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)


def upsampler(scale: int, features: int) -> nn.Sequential:
    """Convolution and pixel shuffle: once for 3, log2(scale) times by 2 for the others (so none for 1)."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [conv3x3(features, features * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def upsampler_scale(state_dict: Mapping[str, Tensor], prefix: str, features: int) -> int:
    """The scale of the upsampler whose weights have this prefix: 3 or a power of 2."""
    shuffles = count(state_dict, rf"{re.escape(prefix)}\.(\d+)\.")
    by_three = shuffles == 1 and state_dict[f"{prefix}.0.weight"].shape[0] == 9 * features
    return 3 if by_three else 2**shuffles


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position: (B, C, H, W) -> (B, C, H, W) in channels_last strides."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        normal = layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normal.permute(0, 3, 1, 2)


class MeanShift(nn.Module):
    """image * gain + bias, a bias per colour.

    `weight` is the identity that published checkpoints hold beside the bias. It is not used: a convolution would do
    this sum in the autocast dtype and lose bits of the image.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, bias: list[float], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("weight", torch.eye(3).view(3, 3, 1, 1))
        self.register_buffer("bias", torch.tensor(bias))

    def forward(self, image: Tensor) -> Tensor:
        return image * self.gain + self.bias.view(1, 3, 1, 1)


def thirds(blocks: int) -> tuple[int, int]:
    """Indices of the blocks whose ends are nearest to 1/3 and 2/3 of a body."""
    first, second = (max(1, round(blocks * third / 3)) for third in (1, 2))
    return first - 1, second - 1
