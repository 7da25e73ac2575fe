"""Restormer: a U-shape of transformer blocks whose attention runs over channels (Zamir et al., CVPR 2022, sections 3.1-3.2).

Four levels, each half the size and twice the channels of the one before. A block is x + MDTA(norm(x)), then x + GDFN(norm(x)).
The output is the input plus what the network predicts. Key names are those of published checkpoints (patch_embed.proj,
encoder_level1 ... latent ... decoder_level1, refinement, down1_2.body.0, up2_1.body.0, reduce_chan_level2, output);
the code is our own. The authors' code and weights are for non-commercial use.

Parameters: 26,126,644 (published as 26.13 M) for the paper's deraining and deblurring network, the default here;
26,111,668 with bias-free normalisation, the Gaussian colour denoiser (26.11 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require, shortest_between
from trainers.models.layers import ChannelNorm, conv1x1, conv3x3, depthwise3x3

LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
PerLevel = Annotated[list[Count], Field(min_length=4, max_length=4)]


class RestormerOptions(NetworkOptions):
    """Size of a Restormer."""

    dim: int = Field(default=48, ge=2, multiple_of=2)
    """Channels of the first level; each level has twice as many as the one before."""
    blocks: PerLevel = Field(default=[4, 6, 6, 8])
    """Transformer blocks of levels 1, 2, 3 (encoder and decoder each) and 4 (latent)."""
    refinement: Count = 4
    """Transformer blocks after the decoder, at full size."""
    heads: PerLevel = Field(default=[1, 2, 4, 8])
    """Attention heads of a block in levels 1 to 4."""
    ffn_expansion: float = Field(default=2.66, gt=0)
    """Hidden channels of the feed-forward network, in multiples of the level's."""
    norm: Literal["with-bias", "bias-free"] = "with-bias"
    """Layer normalisation; the published Gaussian denoisers are bias-free: nothing is subtracted or added."""
    bias: bool = False
    """Biases in the convolutions of the blocks."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> RestormerOptions:
        for level, heads in enumerate(self.heads):
            channels = self.dim * 2 ** min(level, 3)
            if channels % heads:
                raise ValueError(f"heads: {heads} do not divide the {channels} channels of level {level + 1}")
        return self


class BiasFreeNorm(nn.Module):
    """x / sqrt(variance + 1e-5) * weight, the variance over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(dim=1, correction=0, keepdim=True)  # (B, 1, H, W)
        return x * torch.rsqrt(variance + 1e-5) * self.weight.view(1, -1, 1, 1)


class Norm(nn.Module):
    """Either normalisation, under the published key name `body`."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.body = BiasFreeNorm(channels) if norm == "bias-free" else ChannelNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.body(x)
        return normal


class ChannelAttention(nn.Module):
    """MDTA, equation 1: softmax(temperature * q k^T) v with q, k, v (C / heads, H * W) and q, k of unit rows."""

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = conv1x1(channels, channels * 3, bias)
        self.qkv_dwconv = depthwise3x3(channels * 3, bias)
        self.project_out = conv1x1(channels, channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.qkv_dwconv(self.qkv(x))
        query, key, value = (part.flatten(2).unflatten(1, (self.heads, -1)) for part in maps.chunk(3, dim=1))
        logits = normalize(query, dim=-1) @ normalize(key, dim=-1).transpose(-2, -1) * self.temperature
        attended = logits.softmax(dim=-1) @ value  # (B, heads, C / heads, H * W)
        restored: Tensor = self.project_out(attended.reshape(x.shape))
        return restored


class FeedForward(nn.Module):
    """GDFN, equation 2: two paths of 1x1 and depthwise 3x3 convolutions, one of which gates the other by GELU."""

    def __init__(self, channels: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.project_in = conv1x1(channels, hidden * 2, bias)
        self.dwconv = depthwise3x3(hidden * 2, bias)
        self.project_out = conv1x1(hidden, channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, passed = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        mixed: Tensor = self.project_out(gelu(gate) * passed)
        return mixed


class Block(nn.Module):
    def __init__(self, channels: int, heads: int, options: RestormerOptions) -> None:
        super().__init__()
        self.norm1 = Norm(channels, options.norm)
        self.attn = ChannelAttention(channels, heads, options.bias)
        self.norm2 = Norm(channels, options.norm)
        self.ffn = FeedForward(channels, int(channels * options.ffn_expansion), options.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        mixed: Tensor = x + self.ffn(self.norm2(x))
        return mixed


class PatchEmbedding(nn.Module):
    def __init__(self, image_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = conv3x3(image_channels, dim, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.proj(image)
        return features


class Resample(nn.Module):
    """3x3 convolution, then half the size and twice the channels (down) or the reverse (up)."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        outputs, shuffle = (channels * 2, nn.PixelShuffle(2)) if up else (channels // 2, nn.PixelUnshuffle(2))
        self.body = nn.Sequential(conv3x3(channels, outputs, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        resampled: Tensor = self.body(x)
        return resampled


class Restormer(nn.Module):
    """(B, C, H, W) in [0, 1] -> the same size, not clipped; H and W multiples of 8, C image channels."""

    def __init__(self, options: RestormerOptions) -> None:
        super().__init__()
        dim, bias = options.dim, options.bias

        def level(channels: int, index: int, blocks: int) -> nn.Sequential:
            return nn.Sequential(*[Block(channels, options.heads[index], options) for _ in range(blocks)])

        self.patch_embed = PatchEmbedding(options.image_channels, dim)
        self.encoder_level1 = level(dim, 0, options.blocks[0])
        self.down1_2 = Resample(dim, up=False)
        self.encoder_level2 = level(dim * 2, 1, options.blocks[1])
        self.down2_3 = Resample(dim * 2, up=False)
        self.encoder_level3 = level(dim * 4, 2, options.blocks[2])
        self.down3_4 = Resample(dim * 4, up=False)
        self.latent = level(dim * 8, 3, options.blocks[3])
        self.up4_3 = Resample(dim * 8, up=True)
        self.reduce_chan_level3 = conv1x1(dim * 8, dim * 4, bias)
        self.decoder_level3 = level(dim * 4, 2, options.blocks[2])
        self.up3_2 = Resample(dim * 4, up=True)
        self.reduce_chan_level2 = conv1x1(dim * 4, dim * 2, bias)
        self.decoder_level2 = level(dim * 2, 1, options.blocks[1])
        self.up2_1 = Resample(dim * 2, up=True)
        self.decoder_level1 = level(dim * 2, 0, options.blocks[0])  # twice as wide: the skip is not reduced here
        self.refinement = level(dim * 2, 0, options.refinement)
        self.output = conv3x3(dim * 2, options.image_channels, bias)

    def forward(self, image: Tensor) -> Tensor:
        encoded1 = self.encoder_level1(self.patch_embed(image))
        encoded2 = self.encoder_level2(self.down1_2(encoded1))
        encoded3 = self.encoder_level3(self.down2_3(encoded2))
        latent = self.latent(self.down3_4(encoded3))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(latent), encoded3], dim=1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), encoded2], dim=1)))
        x = self.decoder_level1(torch.cat([self.up2_1(x), encoded1], dim=1))
        restored: Tensor = self.output(self.refinement(x)) + image
        return restored


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> RestormerOptions:
    """The options of the Restormer whose state dict this is: the inverse of construction.

    The expansion is known through the hidden channels alone: of the numbers that give them, the shortest is taken.
    """
    firsts = [f"{level}.0.attn.temperature" for level in LEVELS]
    hidden = [f"{level}.0.ffn.project_out.weight" for level in LEVELS]
    require(state_dict, "Restormer", "patch_embed.proj.weight", "output.weight", *firsts, *hidden)
    dim, image_channels = state_dict["patch_embed.proj.weight"].shape[:2]
    widths = [(state_dict[key].shape[1], dim * 2**level) for level, key in enumerate(hidden)]
    return RestormerOptions.model_validate(
        {
            "dim": dim,
            "blocks": [count(state_dict, rf"{level}\.(\d+)\.") for level in LEVELS],
            "refinement": count(state_dict, r"refinement\.(\d+)\."),
            "heads": [state_dict[key].shape[0] for key in firsts],
            "ffn_expansion": shortest_between(
                max(inner / outer for inner, outer in widths), min((inner + 1) / outer for inner, outer in widths)
            ),
            "norm": "with-bias" if "latent.0.norm1.body.bias" in state_dict else "bias-free",
            "bias": "output.bias" in state_dict,
            "image_channels": image_channels,
        }
    )


def natural_taps(options: RestormerOptions) -> dict[str, str]:
    """The output of every level."""
    encoder = {f"enc{level}": f"encoder_level{level}" for level in (1, 2, 3)}
    decoder = {f"dec{level}": f"decoder_level{level}" for level in (3, 2, 1)}
    return encoder | {"latent": "latent"} | decoder


RESTORMER_ENTRY = ModelEntry(
    name="restormer",
    title="Restormer",
    constructor=Restormer,
    options=RestormerOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    multiple_of=lambda options: 8,
    image_channels=lambda options: options.image_channels,
)
