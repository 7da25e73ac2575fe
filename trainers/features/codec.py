"""A small encoder with a codebook of our own, for those without a VQGAN. `kdtrain codec` trains it; one ships with the package."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions, load
from trainers.fields import PathText

WIDTHS, LATENT, CODES = (16, 32, 48, 64), 16, 256


class CodecOptions(FeatureOptions):
    """A small encoder of four levels with 256 codes of 16 numbers at 1/8 size."""

    source: ClassVar[str] = "train one with kdtrain codec FILE, or take builtin:codec"
    multiple_of: ClassVar[int] = 8
    has_codebook: ClassVar[bool] = True

    name: Literal["codec"] = "codec"
    """The feature network."""
    weights: PathText | None = "builtin:codec"
    """The file of its weights: builtin:codec, which ships with the package, or one that kdtrain codec wrote."""


class Block(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.conv2(relu(self.conv1(x))))


class Codec(nn.Module):
    """(B, 3, H, W) in [0, 1] -> maps of 16, 32, 48 and 64 channels at full, 1/2, 1/4 and 1/8 size, and a latent of 16 at 1/8.

    Every level is a convolution (of stride 2 after the first) and a residual block; a 1x1 convolution makes the latent.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.entries = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=1 if i == 3 else 2, padding=1) for i, o in zip(inputs, WIDTHS, strict=True)
        )
        self.blocks = nn.ModuleList(Block(width) for width in WIDTHS)
        self.to_latent = nn.Conv2d(WIDTHS[-1], LATENT, 1)
        self.codebook = nn.Parameter(Tensor(CODES, LATENT).normal_())

    def forward(self, image: Tensor) -> Encoded:
        levels, x = [], image
        for entry, block in zip(self.entries, self.blocks, strict=True):
            x = block(relu(entry(x)))
            levels.append(x)
        return Encoded(tuple(levels), self.to_latent(x))


def build(options: CodecOptions) -> FeatureNetwork:
    network = Codec()
    load(network, options)
    return FeatureNetwork(network, network.codebook.detach().clone())
