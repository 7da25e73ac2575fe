"""DUKD: data-upcycling knowledge distillation for super-resolution (Zhang et al., 2023): zoomed data besides the given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import l1_loss

from trainers.data.resize import imresize
from trainers.fields import Section, Weight
from trainers.methods.augmentation import Augmentation
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements, Run
from trainers.randomness import real_numbers


class DUKDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth; DUKD takes 5 for EDSR x4 and SwinIR, 1 for RCAN x2."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""
    zoom_in: Weight = 1.0
    """Weight of the L1 distance between student and teacher on crops of the ground truth."""
    zoom_out: Weight = 1.0
    """Weight of the L1 distance between student and teacher on inputs that are downscaled once more."""
    zoom_out_label: Weight = 1.0
    """Weight of the L1 distance between the student on inputs that are downscaled once more and the inputs themselves."""


class DUKDOptions(MethodOptions):
    """DUKD: the student imitates the teacher on upcycled data too. Super-resolution only."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["dukd"]
    """The method."""
    weights: DUKDWeights = DUKDWeights()
    """Weights of the losses."""
    augment: float = Field(default=0.3, ge=0, le=1)
    """Probability of each invertible augmentation of the student's branch on crops (that each is drawn by itself is our reading)."""

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        if run.scale == 1:
            return [("name", "zooms with a network that upscales, and this task keeps the size: choose another method")]
        unit = run.scale**2
        return (
            [("", f"downscales inputs once more: data.patch must be a multiple of {unit}")] if run.patch % unit else []
        )


class DUKD(Method):
    """L = w L1(s, y) + L1(s, t) + L_zoom_in + L_zoom_out + L_zoom_out_label (methods.md 6.7).

    - zoom_in: L1(F_T(g), a^-1(F_S(a(g)))), g a random crop of the ground truth in the size of the input, a random invertible
      augmentations.
    - zoom_out: L1(F_S(x'), F_T(x')), zoom_out_label: L1(F_S(x'), x), with x' the input x, bicubically downscaled by the scale.

    One optimiser step on the sum of the terms. In DUKD's code there are two steps, and no zero_grad between them, so that the
    second repeats the gradients of the first; and it undoes augmentations in the order in which they were done. Both are bugs.
    """

    losses = ("pixel", "output", "zoom_in", "zoom_out", "zoom_out_label")

    def __init__(self, options: DUKDOptions) -> None:
        super().__init__()
        self.augment = options.augment

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",))

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        teacher = teachers["teacher"]
        generators = batch.generators("dukd")
        crop = random_crops(batch.gt, batch.lq.shape[-1], generators)
        augmentation = Augmentation(generators, self.augment, crop.device)
        smaller = imresize(batch.lq, batch.lq.shape[-1] / batch.gt.shape[-1])
        restored, _ = student(batch.lq)
        zoomed_in, _ = student(augmentation(crop))
        zoomed_out, _ = student(smaller)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, teacher(batch.lq)[0]),
            "zoom_in": l1_loss(augmentation.undo(zoomed_in), teacher(crop)[0]),
            "zoom_out": l1_loss(zoomed_out, teacher(smaller)[0]),
            "zoom_out_label": l1_loss(zoomed_out, batch.lq),
        }


def random_crops(images: Tensor, side: int, generators: list[torch.Generator]) -> Tensor:
    """(m, 3, H, W) -> (m, 3, side, side), a place per sample."""
    crops = []
    for image, generator in zip(images, generators, strict=True):
        with real_numbers():
            top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.shape[1:])
        crops.append(image[:, top : top + side, left : left + side])
    return torch.stack(crops)
