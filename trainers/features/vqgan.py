"""The encoder of a VQGAN (Esser et al., CVPR 2021), with the key names of the published f16, 1024-code checkpoint, and its codebook."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import pad, silu

from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions, load

WIDTH, MULTIPLES, BLOCKS = 128, (1, 1, 2, 2, 4), 2
LATENT, CODES = 256, 1024


class VQGANOptions(FeatureOptions):
    """The VQGAN of DCKD: ImageNet, factor 16, 1,024 codes of 256 numbers."""

    source: ClassVar[str] = (
        "get ckpts/last.ckpt of vqgan_imagenet_f16_1024 (CompVis/taming-transformers), "
        "https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/"
    )
    multiple_of: ClassVar[int] = 16
    has_codebook: ClassVar[bool] = True

    name: Literal["vqgan"]
    """The feature network."""
    rescale: bool = False
    """Bring images to [-1, 1] first, as the VQGAN was trained; DCKD's code gives it [0, 1]."""


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + residual


class AttnBlock(nn.Module):
    """x + attention over all positions, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, N, C)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))
        return out


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(pad(x, (0, 1, 0, 1)))
        return out


class Level(nn.Module):
    """Two blocks of one width, attention behind each in the last level, and a halving but for the last."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(BLOCKS))
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(BLOCKS if last else 0))
        self.downsample = nn.Identity() if last else Downsample(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output, the output of the first block before any attention)."""
        first = x = self.block[0](x)
        for index, block in enumerate(self.block):
            x = block(x) if index else x
            x = self.attn[index](x) if len(self.attn) else x
        return self.downsample(x), first


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResnetBlock(channels, channels),
            AttnBlock(channels),
            ResnetBlock(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """The encoder proper: image -> (levels, map of 256 channels at 1/16 size)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * multiple for multiple in MULTIPLES]
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1)
        inputs = [WIDTH, *widths[:-1]]
        self.down = nn.ModuleList(
            Level(i, o, last=index == len(widths) - 1) for index, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], LATENT, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        x, levels = self.conv_in(image), []
        for level in self.down:
            x, first = level(x)
            levels.append(first)
        return tuple(levels), self.conv_out(silu(self.norm_out(self.mid(x))))


class VQGAN(nn.Module):
    """(B, 3, H, W) -> five maps of 128, 128, 256, 256, 512 channels at full, ... 1/16 size, and a latent (B, 256, H / 16, W / 16).

    The maps are those of DCKD's code: the output of each level's first block (methods.md 3a).
    """

    def __init__(self, rescale: bool) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.quant_conv = nn.Conv2d(LATENT, LATENT, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(CODES, LATENT)})
        self.rescale = rescale

    def forward(self, image: Tensor) -> Encoded:
        levels, z = self.encoder(image * 2 - 1 if self.rescale else image)
        return Encoded(levels, self.quant_conv(z))


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def build(options: VQGANOptions) -> FeatureNetwork:
    network = VQGAN(options.rescale)
    load(network, options)
    embedding = network.quantize.embedding
    assert isinstance(embedding, nn.Embedding)
    return FeatureNetwork(network, embedding.weight.detach().clone())
