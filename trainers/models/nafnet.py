"""NAFNet: a U-shape of blocks without activation functions (Chen et al., ECCV 2022, sections 3.2-3.3 and figure 3).

A block is x + beta * conv(channel attention(gate(depthwise(conv(norm(x)))))), then x + gamma * conv(gate(conv(norm(x)))), where
gate(a, b) = a * b halves the channels and beta and gamma start at 0. The output is the input plus what the network
predicts. Key names are those of the authors' release: intro, encoders.N.M, downs.N, middle_blks.M, ups.N.0,
decoders.N.M, ending.

Parameters of the GoPro networks, encoder_blocks [1, 1, 1, 28]: 17,111,907 for width 32 and 67,888,835 for 64 (published
as 17.1 M and 67.9 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require
from trainers.models.layers import ChannelNorm, conv1x1, conv3x3, depthwise3x3

PerLevel = Annotated[list[Count], Field(min_length=1, max_length=6)]


class NAFNetOptions(NetworkOptions):
    """Size of a NAFNet."""

    width: Count = 32
    """Channels of the first level; each level has twice as many as the one before."""
    encoder_blocks: PerLevel = Field(default=[1, 1, 1, 28])
    """Blocks of each encoder level, from full size down."""
    middle_blocks: Count = 1
    """Blocks of the deepest level."""
    decoder_blocks: PerLevel = Field(default=[1, 1, 1, 1])
    """Blocks of each decoder level, from the deepest up to full size."""
    dw_expansion: Literal[1, 2, 4] = 2
    """Channels of a block's depthwise convolution, in multiples of the level's (before the gate halves them)."""
    ffn_expansion: Literal[1, 2, 4] = 2
    """Channels of a block's second part, in multiples of the level's (before the gate halves them)."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""

    @model_validator(mode="after")
    def _levels_agree(self) -> NAFNetOptions:
        encoder, decoder = len(self.encoder_blocks), len(self.decoder_blocks)
        if encoder != decoder:
            raise ValueError(
                f"encoder_blocks has {encoder} levels and decoder_blocks {decoder}: give both the same number"
            )
        if self.width % 2 and 1 in (self.dw_expansion, self.ffn_expansion):
            raise ValueError(
                f"width: {self.width} channels cannot be halved by a gate at expansion 1: give an even number"
            )
        return self


def gate(x: Tensor) -> Tensor:
    """SimpleGate: one half of the channels times the other."""
    one, other = x.chunk(2, dim=1)
    return one * other


class Block(nn.Module):
    """NAFNet's block (figure 3c)."""

    def __init__(self, channels: int, options: NAFNetOptions) -> None:
        super().__init__()
        wide, hidden = channels * options.dw_expansion, channels * options.ffn_expansion
        self.norm1 = ChannelNorm(channels, eps=1e-6)
        self.conv1 = conv1x1(channels, wide)
        self.conv2 = depthwise3x3(wide)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv1x1(wide // 2, wide // 2))
        self.conv3 = conv1x1(wide // 2, channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.norm2 = ChannelNorm(channels, eps=1e-6)
        self.conv4 = conv1x1(channels, hidden)
        self.conv5 = conv1x1(hidden // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gated = gate(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.beta * self.conv3(gated * self.sca(gated))
        mixed: Tensor = x + self.gamma * self.conv5(gate(self.conv4(self.norm2(x))))
        return mixed


class NAFNet(nn.Module):
    """(B, C, H, W) in [0, 1] -> the same size, not clipped; H and W multiples of 2^levels, C image channels."""

    def __init__(self, options: NAFNetOptions) -> None:
        super().__init__()

        def level(channels: int, blocks: int) -> nn.Sequential:
            return nn.Sequential(*[Block(channels, options) for _ in range(blocks)])

        widths = [options.width * 2**index for index in range(len(options.encoder_blocks))]
        self.intro = conv3x3(options.image_channels, options.width)
        self.encoders = nn.ModuleList(map(level, widths, options.encoder_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(width, width * 2, 2, stride=2) for width in widths)
        self.middle_blks = level(widths[-1] * 2, options.middle_blocks)
        self.ups = nn.ModuleList(
            nn.Sequential(conv1x1(width * 2, width * 4, bias=False), nn.PixelShuffle(2)) for width in reversed(widths)
        )
        self.decoders = nn.ModuleList(map(level, reversed(widths), options.decoder_blocks))
        self.ending = conv3x3(options.width, options.image_channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.intro(image)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle_blks(x)
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips), strict=True):
            x = decoder(up(x) + skip)
        restored: Tensor = self.ending(x) + image
        return restored


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> NAFNetOptions:
    """The options of the NAFNet whose state dict this is: the inverse of construction."""
    first = "encoders.0.0"
    require(
        state_dict,
        "NAFNet",
        "intro.weight",
        f"{first}.conv1.weight",
        f"{first}.conv4.weight",
        f"{first}.beta",
        "downs.0.weight",
    )
    width, image_channels = state_dict["intro.weight"].shape[:2]
    levels = range(count(state_dict, r"downs\.(\d+)\."))
    return NAFNetOptions.model_validate(
        {
            "width": width,
            "encoder_blocks": [count(state_dict, rf"encoders\.{level}\.(\d+)\.") for level in levels],
            "middle_blocks": count(state_dict, r"middle_blks\.(\d+)\."),
            "decoder_blocks": [count(state_dict, rf"decoders\.{level}\.(\d+)\.") for level in levels],
            "dw_expansion": state_dict[f"{first}.conv1.weight"].shape[0] // width,
            "ffn_expansion": state_dict[f"{first}.conv4.weight"].shape[0] // width,
            "image_channels": image_channels,
        }
    )


def natural_taps(options: NAFNetOptions) -> dict[str, str]:
    """The output of every level."""
    levels = len(options.encoder_blocks)
    encoder = {f"enc{index + 1}": f"encoders.{index}" for index in range(levels)}
    decoder = {f"dec{levels - index}": f"decoders.{index}" for index in range(levels)}
    return encoder | {"latent": "middle_blks"} | decoder


NAFNET_ENTRY = ModelEntry(
    name="nafnet",
    title="NAFNet",
    constructor=NAFNet,
    options=NAFNetOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    multiple_of=lambda options: 2 ** len(options.encoder_blocks),
    image_channels=lambda options: options.image_channels,
)
