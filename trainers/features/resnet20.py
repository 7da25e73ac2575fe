"""ResNet-20 for CIFAR-10 (He et al., CVPR 2016, section 4.2), with the key names of akamaster/pytorch_resnet_cifar10."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions, load
from trainers.features.vgg19 import IMAGENET_MEAN, IMAGENET_STD


class ResNet20Options(FeatureOptions):
    """ResNet-20 trained on CIFAR-10: its stem and its three stages of 16, 32 and 64 channels."""

    source: ClassVar[str] = (
        "get pretrained_models/resnet20-12fca82f.th of https://github.com/akamaster/pytorch_resnet_cifar10"
    )
    multiple_of: ClassVar[int] = 4

    name: Literal["resnet20"]
    """The feature network."""
    normalize: bool = True
    """Bring images to ImageNet's mean and deviation first, as this network was trained."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights: every second pixel, with zero channels on both sides (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            added = x.shape[1] // 2
            shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added, added))
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """(B, 3, H, W) in [0, 1] -> four maps of 16, 16, 32 and 64 channels at full, full, 1/2 and 1/4 size."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Encoded:
        x = (image - self.mean) / self.std if self.normalize else image
        levels = [relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            levels.append(stage(levels[-1]))
        return Encoded(tuple(levels), levels[-1])


def build(options: ResNet20Options) -> FeatureNetwork:
    network = ResNet20(options.normalize)
    load(network, options, rename=lambda key: key.removeprefix("module."))
    return FeatureNetwork(network)
