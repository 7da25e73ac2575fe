"""The contrastive term of CSD: contrastive self-distillation (Wang et al., IJCAI 2021), here from a frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.features import AnyFeatureOptions, build
from trainers.features.codec import CodecOptions
from trainers.fields import Fixed, Section, Weight
from trainers.methods.base import Batch, Features, Method, MethodOptions, Network, Requirements, Run
from trainers.methods.image_contrast import contrast, degraded


class CSDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    contrast: Weight = Fixed(value=3e-4, ramp=1000)
    """Weight of the contrastive loss: our reading, measured with small feature networks; CSD's 200 with VGG-19 is 0.078 here."""


class CSDOptions(MethodOptions):
    """CSD's contrast: the student's image is pulled to the teacher's and pushed from the degraded images of the batch."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["csd"]
    """The method."""
    weights: CSDWeights = CSDWeights()
    """Weights of the losses."""
    features: AnyFeatureOptions = CodecOptions()
    """The network in whose features images are compared; CSD's is vgg19."""
    negatives: int = Field(default=10, ge=1)
    """Degraded images that are the negatives of every sample: the first ones of the batch, a sample's own may be among them."""
    eps: float = Field(default=1e-3, gt=0)
    """Smallest denominator, relative to the positive's features (our reading; CSD's is 1e-7, absolute)."""

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        return [(f"features.{key}", f"{text}") for key, text in self.features.problems(run.patch)]


class CSD(Method):
    """L = L1(s, y) + w L_con (methods.md 6.5).

    L_con = sum_l w_l mean |f_l(t) - f_l(s)| / (mean_k mean |f_l(s) - f_l(neg_k)| + eps mean |f_l(t)|), per sample

    - The negatives are the degraded images (in super-resolution bicubically upscaled) of the first K samples of the batch,
      shared by all anchors. w_l: 1/32, 1/16, 1/8, 1/4, 1.
    - In CSD the student is a slice of the teacher's channels and both train; here, as a baseline, the term alone with a frozen
      teacher. With `student.weights: teacher` the student also starts from those channels.
    - CSD's denominator is the sum over the negatives, and pixels go to 255: its weight of 200 with 10 negatives is
      200 / 255 / 10 = 0.078 here. Ratio per sample, eps, and the default weight (methods.md 8) are our reading.
    """

    losses = ("pixel", "contrast")

    def __init__(self, options: CSDOptions) -> None:
        super().__init__()
        self.features = build(options.features)
        self.negatives = options.negatives
        self.eps = options.eps

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), batch_coupled=True)

    def share(self, batch: Batch, teachers: Mapping[str, Network]) -> dict[str, tuple[Tensor, Features]]:
        images = degraded(batch.lq, batch.gt.shape[-1] // batch.lq.shape[-1])
        levels = self.features(images).levels
        return {"degraded": (images, {str(level): feature for level, feature in enumerate(levels)})}

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, _ = student(batch.lq)
        imitated, _ = teachers["teacher"](batch.lq)
        with torch.no_grad():
            positive = self.features(imitated).levels
        _, shared = batch.shared["degraded"]
        negatives = [feature[: self.negatives] for feature in shared.values()]  # (K, C, h, w)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "contrast": contrast(self.features(restored).levels, positive, negatives, self.eps).mean(),
        }
