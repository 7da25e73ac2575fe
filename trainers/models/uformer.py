"""Uformer: a U-shape of window transformer blocks with a depthwise convolution inside (Wang et al., CVPR 2022, section 3).

Each level has half the size and twice the channels of the one before. A block is x + attention(norm(x) + modulator), then
x + LeFF(norm(x)); every other block shifts its windows. The output is the input plus what the network predicts. Key names are
those of the authors' release: input_proj.proj.0, encoderlayer_L.blocks.B, dowsample_L.conv.0 (so spelt), conv.blocks.B,
upsample_L.deconv.0, decoderlayer_L.blocks.B, output_proj.proj.0. Stochastic depth, which they train with, is left out.

Parameters of the default, Uformer-B: 50,880,946 (published as 50.88 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require, shortest_between
from trainers.models.layers import conv3x3, depthwise3x3
from trainers.models.windows import WindowAttention, in_windows, window_of

PerLevel = Annotated[list[Count], Field(min_length=3, max_length=13)]


class UformerOptions(NetworkOptions):
    """Size of a Uformer; the default is Uformer-B."""

    embed_dim: Count = 32
    """Channels of the first level; each level has twice as many as the one before."""
    depths: PerLevel = Field(default=[1, 2, 8, 8, 2, 8, 8, 2, 1])
    """Transformer blocks of the encoder levels, the deepest level and the decoder levels, in that order."""
    heads: PerLevel = Field(default=[1, 2, 4, 8, 16, 16, 8, 4, 2])
    """Attention heads of their blocks."""
    window: int = Field(default=8, ge=2)
    """Side of an attention window."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden channels of a block's feed-forward network, in multiples of the level's."""
    modulator: bool = True
    """Learnt offsets for each position of a window, in the decoder."""
    train_size: Count = 128
    """Side of the images it was made for; a level where such an image is one window does not shift its windows."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""

    @property
    def levels(self) -> int:
        return len(self.depths) // 2

    def channels(self, index: int) -> int:
        """Of part `index` of `depths`. A decoder level is twice as wide as its encoder level: the skip is not reduced."""
        doublings = index if index <= self.levels else 2 * self.levels - index + 1
        channels: int = self.embed_dim * 2**doublings
        return channels

    @model_validator(mode="after")
    def _parts_agree(self) -> UformerOptions:
        if len(self.depths) != len(self.heads) or len(self.depths) % 2 == 0:
            given = f"depths has {len(self.depths)} parts and heads {len(self.heads)}"
            raise ValueError(f"{given}: give both the same odd number, encoder levels, the deepest, decoder levels")
        for index, heads in enumerate(self.heads):
            if self.channels(index) % heads:
                raise ValueError(
                    f"heads: {heads} do not divide the {self.channels(index)} channels of part {index + 1}"
                )
        return self


class Projection(nn.Module):
    """Queries, keys and values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, channels * 2)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.to_kv(windows).chunk(2, dim=-1)
        return self.to_q(windows), key, value


class Attention(WindowAttention):
    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__(channels, window, heads)
        self.qkv = Projection(channels)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(windows)
        return self.attend(query, key, value, mask)


class FeedForward(nn.Module):
    """LeFF: linear, depthwise 3x3 convolution, linear, with GELU between (section 3.2, figure 2c); (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(channels, hidden))
        self.dwconv = nn.Sequential(depthwise3x3(hidden))
        self.linear2 = nn.Sequential(nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = gelu(self.linear1(x)).permute(0, 3, 1, 2)
        mixed: Tensor = self.linear2(gelu(self.dwconv(wide)).permute(0, 2, 3, 1))
        return mixed


class Block(nn.Module):
    """LeWin block; (B, H, W, C)."""

    def __init__(self, options: UformerOptions, index: int, *, shifted: bool) -> None:
        super().__init__()
        channels, window = options.channels(index), options.window
        decoder = index > options.levels
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.modulator = nn.Embedding(window * window, channels) if options.modulator and decoder else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, window, options.heads[index])
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels, int(channels * options.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + in_windows(self.norm1(x), self.window, self.shift, self.attention)
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def attention(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        attended: Tensor = self.attn(windows, mask)
        return attended


class Level(nn.Module):
    """The blocks of a level; (B, C, H, W)."""

    def __init__(self, options: UformerOptions, index: int) -> None:
        super().__init__()
        side = options.train_size // 2 ** min(index, 2 * options.levels - index)
        shifting = side > options.window
        self.blocks = nn.Sequential(
            *[Block(options, index, shifted=shifting and block % 2 == 1) for block in range(options.depths[index])]
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return mixed


class Named(nn.Module):
    """Layers in a row under the attribute `name`, as published keys have them."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.get_submodule(self.name)(x)
        return mapped


class Uformer(nn.Module):
    """(B, C, H, W) in [0, 1] -> the same size, not clipped; H and W multiples of window * 2^levels, C image channels."""

    def __init__(self, options: UformerOptions) -> None:
        super().__init__()
        self.levels = options.levels
        self.input_proj = Named("proj", conv3x3(options.image_channels, options.embed_dim), nn.LeakyReLU())
        self.output_proj = Named("proj", conv3x3(options.embed_dim * 2, options.image_channels))
        for level in range(self.levels):
            width = options.channels(level)
            self.add_module(f"encoderlayer_{level}", Level(options, level))
            self.add_module(f"dowsample_{level}", Named("conv", nn.Conv2d(width, width * 2, 4, stride=2, padding=1)))
        self.conv = Level(options, self.levels)
        for level in range(self.levels):
            index = self.levels + level  # of the part before
            inputs, outputs = options.channels(index), options.channels(index + 1) // 2
            self.add_module(f"upsample_{level}", Named("deconv", nn.ConvTranspose2d(inputs, outputs, 2, stride=2)))
            self.add_module(f"decoderlayer_{level}", Level(options, index + 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.input_proj(image)
        skips = []
        for level in range(self.levels):
            skips.append(self.get_submodule(f"encoderlayer_{level}")(x))
            x = self.get_submodule(f"dowsample_{level}")(skips[-1])
        x = self.conv(x)
        for level in range(self.levels):
            x = torch.cat([self.get_submodule(f"upsample_{level}")(x), skips.pop()], dim=1)
            x = self.get_submodule(f"decoderlayer_{level}")(x)
        restored: Tensor = image + self.output_proj(x)
        return restored


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> UformerOptions:
    """The options of the Uformer whose state dict this is: the inverse of construction.

    Weights do not tell train_size; 128 is taken, as in the authors' tests.
    """
    stem, table, hidden = (
        "input_proj.proj.0.weight",
        "blocks.0.attn.relative_position_bias_table",
        "blocks.0.mlp.linear1.0.weight",
    )
    require(
        state_dict,
        "Uformer",
        stem,
        f"encoderlayer_0.{table}",
        f"conv.{table}",
        f"conv.{hidden}",
        "dowsample_0.conv.0.weight",
    )
    embed_dim, image_channels = state_dict[stem].shape[:2]
    levels = range(count(state_dict, r"encoderlayer_(\d+)\."))
    parts = [*(f"encoderlayer_{level}" for level in levels), "conv", *(f"decoderlayer_{level}" for level in levels)]
    require(state_dict, "Uformer", *(f"{part}.{key}" for part in parts for key in (table, hidden)))
    widths = [tuple(state_dict[f"{part}.{hidden}"].shape) for part in parts]
    return UformerOptions.model_validate(
        {
            "embed_dim": embed_dim,
            "depths": [count(state_dict, rf"{part}\.blocks\.(\d+)\.") for part in parts],
            "heads": [state_dict[f"{part}.{table}"].shape[1] for part in parts],
            "window": window_of(state_dict[f"conv.{table}"]),
            "mlp_ratio": shortest_between(
                max(inner / outer for inner, outer in widths), min((inner + 1) / outer for inner, outer in widths)
            ),
            "modulator": "decoderlayer_0.blocks.0.modulator.weight" in state_dict,
            "image_channels": image_channels,
        }
    )


def natural_taps(options: UformerOptions) -> dict[str, str]:
    """The output of every level."""
    encoder = {f"enc{level + 1}": f"encoderlayer_{level}" for level in range(options.levels)}
    decoder = {f"dec{options.levels - level}": f"decoderlayer_{level}" for level in range(options.levels)}
    return encoder | {"latent": "conv"} | decoder


UFORMER_ENTRY = ModelEntry(
    name="uformer",
    title="Uformer",
    constructor=Uformer,
    options=UformerOptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    multiple_of=lambda options: options.window * 2**options.levels,
    image_channels=lambda options: options.image_channels,
)
