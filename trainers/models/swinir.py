"""SwinIR: shifted-window transformer blocks between two convolutions (Liang et al., ICCV Workshops 2021, section 3).

A 3x3 convolution, residual groups of transformer blocks, normalisation and a convolution inside a global skip, then one of four
ends (`upsampler`). Key names are those of the authors' release: conv_first, patch_embed.norm, layers.G.residual_group.blocks.B...,
layers.G.conv, norm, conv_after_body, conv_before_upsample, upsample, conv_last. The masks that its checkpoints hold beside
the weights (attn_mask) fit one size of image only: they are left out on loading, and made for each image anew.

Parameters: 11,752,487 for classical super-resolution at x2 (published as 11.8 M), 910,152 / 918,267 / 929,628 for the lightweight one at
x2 / x3 / x4. The paper's 878 K, 886 K and 897 K are these without the 32,400 numbers of the position bias tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from trainers.models.entry import Count, ModelEntry, NetworkOptions
from trainers.models.keys import count, require, shortest_between
from trainers.models.layers import DIV2K_MEAN, ChannelNorm, conv1x1, conv3x3, thirds, upsampler, upsampler_scale
from trainers.models.windows import WindowAttention, in_windows, window_of

SLOPE = 0.2  # of the leaky ReLUs, but for the one in conv_before_upsample
WIDTH = 64  # channels after the body, before the upsampler
PerGroup = Annotated[list[Count], Field(min_length=1)]


class SwinIROptions(NetworkOptions):
    """Size of a SwinIR; the default is the classical super-resolution network."""

    scale: Literal[1, 2, 3, 4, 8] = 2
    """Upsampling factor; 1 for denoising."""
    embed_dim: Count = 180
    """Channels of the body."""
    depths: PerGroup = Field(default=[6, 6, 6, 6, 6, 6])
    """Transformer blocks of each residual group."""
    heads: PerGroup = Field(default=[6, 6, 6, 6, 6, 6])
    """Attention heads of the blocks of each group."""
    window: int = Field(default=8, ge=2)
    """Side of an attention window in pixels."""
    mlp_ratio: float = Field(default=2.0, gt=0)
    """Hidden channels of a block's perceptron, in multiples of embed_dim."""
    upsampler: Literal["pixelshuffle", "pixelshuffledirect", "nearest+conv", "none"] = "pixelshuffle"
    """End of the network: classical, lightweight and real-world super-resolution; none at scale 1."""
    residual_conv: Literal["1conv", "3conv"] = "1conv"
    """Convolutions at the end of each group and of the body (3conv: the large real-world network)."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    pixel_range: Literal[1, 255] = 1
    """Range of pixels inside the network: 255 for the authors' JPEG networks. In and out: always [0, 1]."""

    @model_validator(mode="after")
    def _parts_agree(self) -> SwinIROptions:
        if len(self.depths) != len(self.heads):
            raise ValueError(
                f"depths has {len(self.depths)} groups and heads {len(self.heads)}: give both the same number"
            )
        for heads in self.heads:
            if self.embed_dim % heads:
                raise ValueError(f"heads: {heads} do not divide the {self.embed_dim} channels of embed_dim")
        if (self.scale == 1) != (self.upsampler == "none"):
            raise ValueError(f"upsampler: {self.upsampler} at scale {self.scale}: scale 1 needs none, and none scale 1")
        if self.upsampler == "nearest+conv" and self.scale not in (2, 4):
            raise ValueError(f"upsampler: nearest+conv upscales by 2 or 4, not by {self.scale}")
        return self


class Attention(WindowAttention):
    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__(channels, window, heads)
        self.qkv = nn.Linear(channels, channels * 3)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(windows).chunk(3, dim=-1)
        return self.attend(query, key, value, mask)


class Block(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x)); (B, H, W, C)."""

    def __init__(self, options: SwinIROptions, heads: int, *, shifted: bool) -> None:
        super().__init__()
        channels, hidden = options.embed_dim, int(options.embed_dim * options.mlp_ratio)
        self.window = options.window
        self.shift = options.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, options.window, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(channels, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + in_windows(self.norm1(x), self.window, self.shift, self.attn)
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class Group(nn.Module):
    """RSTB: x + convolution(blocks(x)); (B, C, H, W)."""

    def __init__(self, options: SwinIROptions, depth: int, heads: int) -> None:
        super().__init__()
        blocks = nn.Sequential(*[Block(options, heads, shifted=index % 2 == 1) for index in range(depth)])
        self.residual_group = nn.Sequential(OrderedDict(blocks=blocks))
        self.conv = residual_conv(options)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.residual_group(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        added: Tensor = x + self.conv(deep)
        return added


class SwinIR(nn.Module):
    """(B, C, H, W) in [0, 1] -> (B, C, scale * H, scale * W), not clipped; H and W multiples of the window, C image channels."""

    mean: Tensor

    def __init__(self, options: SwinIROptions) -> None:
        super().__init__()
        channels, image_channels = options.embed_dim, options.image_channels
        self.upsampler, self.scale, self.pixel_range = options.upsampler, options.scale, options.pixel_range
        mean = DIV2K_MEAN if image_channels == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.conv_first = conv3x3(image_channels, channels)
        self.patch_embed = nn.Sequential(OrderedDict(norm=ChannelNorm(channels, eps=1e-5)))
        self.layers = nn.ModuleList(
            Group(options, depth, heads) for depth, heads in zip(options.depths, options.heads, strict=True)
        )
        self.norm = ChannelNorm(channels, eps=1e-5)
        self.conv_after_body = residual_conv(options)
        if options.upsampler == "pixelshuffledirect":
            shuffle = nn.PixelShuffle(options.scale)
            self.upsample = nn.Sequential(conv3x3(channels, image_channels * options.scale**2), shuffle)
        elif options.upsampler == "none":
            self.conv_last = conv3x3(channels, image_channels)
        else:
            self.conv_before_upsample = nn.Sequential(conv3x3(channels, WIDTH), nn.LeakyReLU())
            if options.upsampler == "pixelshuffle":
                self.upsample = upsampler(options.scale, WIDTH)
            else:
                for step in range(1, options.scale.bit_length()):
                    self.add_module(f"conv_up{step}", conv3x3(WIDTH, WIDTH))
                self.conv_hr = conv3x3(WIDTH, WIDTH)
            self.conv_last = conv3x3(WIDTH, image_channels)
        self.register_load_state_dict_pre_hook(leave_out_masks)  # type: ignore[no-untyped-call]

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean) * self.pixel_range
        x = self.conv_first(image)
        deep = self.patch_embed(x)
        for layer in self.layers:
            deep = layer(deep)
        restored = self.end(self.conv_after_body(self.norm(deep)) + x, image)
        return restored / self.pixel_range + self.mean

    def end(self, x: Tensor, image: Tensor) -> Tensor:
        """From the body's features to the restored image."""
        restored: Tensor
        if self.upsampler == "none":
            restored = image + self.conv_last(x)
        elif self.upsampler == "pixelshuffledirect":
            restored = self.upsample(x)
        elif self.upsampler == "pixelshuffle":
            restored = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        else:
            x = self.conv_before_upsample(x)
            for step in range(1, self.scale.bit_length()):
                doubled = interpolate(x, scale_factor=2, mode="nearest")
                x = leaky_relu(self.get_submodule(f"conv_up{step}")(doubled), SLOPE)
            restored = self.conv_last(leaky_relu(self.conv_hr(x), SLOPE))
        return restored


def residual_conv(options: SwinIROptions) -> nn.Module:
    channels = options.embed_dim
    if options.residual_conv == "1conv":
        return conv3x3(channels, channels)
    narrow = channels // 4
    activation = nn.LeakyReLU(SLOPE)
    return nn.Sequential(
        conv3x3(channels, narrow), activation, conv1x1(narrow, narrow), activation, conv3x3(narrow, channels)
    )


def leave_out_masks(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Takes the masks of published checkpoints out of what is about to be loaded."""
    for key in [key for key in state_dict if key.endswith(".attn_mask")]:
        del state_dict[key]


def options_from_state_dict(state_dict: Mapping[str, Tensor]) -> SwinIROptions:
    """The options of the SwinIR whose state dict this is: the inverse of construction.

    Weights do not tell pixel_range: 255 is taken for a window of 7, as in the authors' JPEG networks, else 1.
    """
    block = "layers.0.residual_group.blocks.0"
    table = f"{block}.attn.relative_position_bias_table"
    require(state_dict, "SwinIR", "conv_first.weight", "patch_embed.norm.weight", table, f"{block}.mlp.fc1.weight")
    embed_dim, image_channels = state_dict["conv_first.weight"].shape[:2]
    groups = range(count(state_dict, r"layers\.(\d+)\."))
    hidden = len(state_dict[f"{block}.mlp.fc1.weight"])
    window = window_of(state_dict[table])
    return SwinIROptions.model_validate(
        {
            **end_of(state_dict, image_channels),
            "embed_dim": embed_dim,
            "depths": [count(state_dict, rf"layers\.{group}\.residual_group\.blocks\.(\d+)\.") for group in groups],
            "heads": [state_dict[table.replace("layers.0", f"layers.{group}")].shape[1] for group in groups],
            "window": window,
            "mlp_ratio": shortest_between(hidden / embed_dim, (hidden + 1) / embed_dim),
            "residual_conv": "3conv" if "conv_after_body.0.weight" in state_dict else "1conv",
            "image_channels": image_channels,
            "pixel_range": 255 if window == 7 else 1,
        }
    )


def end_of(state_dict: Mapping[str, Tensor], image_channels: int) -> dict[str, Any]:
    """upsampler and scale."""
    if "conv_hr.weight" in state_dict:
        return {"upsampler": "nearest+conv", "scale": 2 ** count(state_dict, r"conv_up(\d+)\.")}
    if "conv_before_upsample.0.weight" in state_dict:
        return {"upsampler": "pixelshuffle", "scale": upsampler_scale(state_dict, "upsample", WIDTH)}
    if "upsample.0.weight" in state_dict:
        scale = round((len(state_dict["upsample.0.weight"]) / image_channels) ** 0.5)
        return {"upsampler": "pixelshuffledirect", "scale": scale}
    return {"upsampler": "none", "scale": 1}


def natural_taps(options: SwinIROptions) -> dict[str, str]:
    """The thirds of the body: t1 and t2 after the groups nearest to 1/3 and 2/3, t3 before the global skip."""
    first, second = thirds(len(options.depths))
    return {"t1": f"layers.{first}", "t2": f"layers.{second}", "t3": "conv_after_body"}


SWINIR_ENTRY = ModelEntry(
    name="swinir",
    title="SwinIR",
    constructor=SwinIR,
    options=SwinIROptions,
    options_from_state_dict=options_from_state_dict,
    natural_taps=natural_taps,
    scale=lambda options: options.scale,
    multiple_of=lambda options: options.window,
    image_channels=lambda options: options.image_channels,
    pixel_range=lambda options: options.pixel_range,
)
