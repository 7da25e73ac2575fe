"""Feature networks for image-level losses, by name. To add one: write its file, then add it to the union and to the table below."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.features import codec, resnet20, taesd, vgg19, vqgan
from trainers.features.base import Encoded, FeatureNetwork, FeatureOptions

__all__ = ["FEATURES", "AnyFeatureOptions", "Encoded", "FeatureNetwork", "FeatureOptions", "build"]

AnyFeatureOptions = Annotated[
    codec.CodecOptions | vgg19.VGG19Options | vqgan.VQGANOptions | resnet20.ResNet20Options | taesd.TAESDOptions,
    Field(discriminator="name"),
]

FEATURES: dict[type[FeatureOptions], Any] = {
    codec.CodecOptions: codec.build,
    vgg19.VGG19Options: vgg19.build,
    vqgan.VQGANOptions: vqgan.build,
    resnet20.ResNet20Options: resnet20.build,
    taesd.TAESDOptions: taesd.build,
}


def build(options: FeatureOptions) -> FeatureNetwork:
    """The feature network that these options describe, with its weights.

    Raises:
        InputError: the weights are missing or do not fit.
    """
    network: FeatureNetwork = FEATURES[type(options)](options)
    return network
