"""The encoder of a tiny image auto-encoder (madebyollin/taesd, the taef2 variant): a small real latent space."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions, load

WIDTH, LATENT = 64, 32


class TAESDOptions(FeatureOptions):
    """The encoder of the tiny auto-encoder TAEF2: its maps at full, 1/2, 1/4 and 1/8 size."""

    source: ClassVar[str] = "get taef2_encoder.pth of https://github.com/madebyollin/taesd"
    multiple_of: ClassVar[int] = 8

    name: Literal["taesd"]
    """The feature network."""


class Block(nn.Module):
    """relu(conv(y) + y), where y is x, or x plus a normalised 1x1 branch of it (in the deepest blocks)."""

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool = None
        if normalized:
            wide = 4 * WIDTH
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return relu(self.conv(x) + x)


class TAESDEncoder(nn.Sequential):
    """(B, 3, H, W) in [0, 1] -> four maps of 64 channels, each before the next halving, and a latent of 32 channels at 1/8 size."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), Block(normalized=False)]
        for stage in range(3):
            layers += [
                nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False),
                *(Block(normalized=stage == 2) for _ in range(3)),
            ]
        super().__init__(*layers, nn.Conv2d(WIDTH, LATENT, 3, padding=1))

    def forward(self, image: Tensor) -> Encoded:
        levels, x = [], image
        for index, layer in enumerate(self):
            if index in (2, 6, 10, 14):  # a halving, or the projection to the latent
                levels.append(x)
            x = layer(x)
        return Encoded(tuple(levels), x)


def _conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def build(options: TAESDOptions) -> FeatureNetwork:
    network = TAESDEncoder()
    load(network, options)
    return FeatureNetwork(network)
