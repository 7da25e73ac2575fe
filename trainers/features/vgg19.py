"""VGG-19 up to relu5_1 (Simonyan & Zisserman, ICLR 2015, configuration E), with torchvision's key names."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions, load

# Channels of the convolutions of each block; a max pooling stands between blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG19Options(FeatureOptions):
    """VGG-19: relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1, as in AECR-Net and CSD."""

    source: ClassVar[str] = "get https://download.pytorch.org/models/vgg19-dcbb9e9d.pth (torchvision's vgg19)"
    multiple_of: ClassVar[int] = 16

    name: Literal["vgg19"]
    """The feature network."""
    normalize: bool = False
    """Bring images to ImageNet's mean and deviation first; AECR-Net's and CSD's code do not."""


class VGG19(nn.Module):
    """(B, 3, H, W) in [0, 1] -> five maps of 64, 128, 256, 512, 512 channels at full, 1/2, ... 1/16 size."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}
        index, inputs = 0, 3
        for block in BLOCKS:
            for outputs in block:
                layers[str(index)] = nn.Conv2d(inputs, outputs, 3, padding=1)
                index, inputs = index + 2, outputs  # a ReLU follows each convolution in torchvision's numbering,
            index += 1  # and a pooling each block
        self.features = nn.ModuleDict(layers)
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Encoded:
        x = (image - self.mean) / self.std if self.normalize else image
        convolutions = iter(self.features.values())
        levels = []
        for number, block in enumerate(BLOCKS):
            x = max_pool2d(x, 2) if number else x
            for place, _ in enumerate(block):
                x = relu(next(convolutions)(x))
                if place == 0:
                    levels.append(x)
        return Encoded(tuple(levels), x)


def build(options: VGG19Options) -> FeatureNetwork:
    network = VGG19(options.normalize)
    load(network, options)
    return FeatureNetwork(network)
