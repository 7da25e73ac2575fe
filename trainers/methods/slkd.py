"""SLKD: simultaneous learning knowledge distillation (Zhang & Yan, ICASSP 2025, arXiv 2501.09268)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, kl_div, l1_loss

import kdops
from kdops import nss
from trainers import taps
from trainers.errors import InputError
from trainers.fields import Fixed, PathText, Section, Weight
from trainers.methods.base import Batch, Features, Method, MethodOptions, Network, Requirements, Run

Extractor = Callable[[Tensor], list[Tensor]]
BLOCK = 16  # side of PIQE's blocks
PIXEL_RANGE = 255.0  # of the constants of BRISQUE and PIQE


class SLKDWeights(Section):
    """Weights of the losses. The journal version has 0.5, 0.1 and 0.1 for the last three, in an order that is our reading."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    kl: Weight = 0.5
    """Weight of the Kullback-Leibler divergence between the images of teacher A and student."""
    nc: Weight = Fixed(value=0.1, final=0.01, decay=1000)
    """Weight of L_NC: right at the start and too strong later, so it falls (our reading, methods.md 8)."""
    et: Weight = 0.1
    """Weight of L_ET."""


class SLKDOptions(MethodOptions):
    """SLKD: the encoder learns from a teacher of degraded images, the decoder from a teacher of clean ones. Same-size tasks only."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["slkd"]
    """The method."""
    weights: SLKDWeights = SLKDWeights()
    """Weights of the losses."""
    clean_weights: PathText | None = None
    """Weights of teacher B, trained to reproduce clean images; null takes teacher A's (our reading: the paper leaves both open)."""
    size: int = Field(default=64, ge=BLOCK, multiple_of=BLOCK)
    """Side to which the scale conversion module brings every tap."""
    natural: Literal["maps", "mscn", "features"] = "maps"
    """What L_NC compares: the normalised map and its 4 products, the map alone, or BRISQUE's 36 numbers (our reading)."""
    texture: Literal["variance", "edges"] = "variance"
    """What L_ET compares: the variances of 16 x 16 blocks, or these and the deviations along their borders (our reading)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the softmax over pixels (our reading)."""

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        if run.scale == 1:
            return []
        return [
            (
                "name",
                "gives teacher B the clean image, which in super-resolution is larger than its input: same-size tasks only",
            )
        ]


class SLKD(Method):
    r"""L = L_pix + w1 L_KL + w2 L_NC + w3 L_ET (methods.md 2a: the equations of L_NC, L_ET and the scale conversion are our reading).

    The student sees the degraded image D once. Teacher A sees D, teacher B the clean image G.

    - nc (DRL): mean over encoder taps k of mean | e_B(SCM(S_k(D))) - e_B(SCM(A_k(D))) |, e_B BRISQUE's extractor.
    - et (IRL): mean over decoder taps k of mean | e_P(SCM(S_k(D))) - e_P(SCM(B_k(G))) |, e_P PIQE's extractor.
    - SCM, the scale conversion module: one channel, a common size (bilinear), sigmoid x 255, so that the constants of BRISQUE and PIQE
      keep their meaning. The teacher's side is fixed: the mean over the channels of the RMS-normalised tap. The student's is
      trained: its adapter, which is linear, and the same mean are one 1x1 convolution to one channel. With both sides trained
      the loss collapses to constants (0.709 -> 0.0097 in 300 steps on unrelated features, methods.md 8).
    - pixel: ||S_r - G||_1. kl: KL(softmax(A_r / t) || softmax(S_r / t)) over all pixels and colours of an image.

    The extractors give maps and variances, not scores: those pick from tables and count blocks, and have no gradient. Nothing is rounded.
    """

    losses = ("pixel", "kl", "nc", "et")

    def __init__(self, options: SLKDOptions) -> None:
        super().__init__()
        self.options = options

    def requirements(self) -> Requirements:
        own = self.options.clean_weights
        weights = {"clean": own} if own else {}
        return Requirements(("degraded", "clean"), taps=True, tap_groups=("encoder", "decoder"), weights=weights)

    def targets(self, lq: Tensor, gt: Tensor, teachers: Mapping[str, Network]) -> Features:
        """Teacher A's taps, and in the decoder teacher B's."""
        degraded, clean = teachers["degraded"](lq)[1], teachers["clean"](gt)[1]
        decoder = names(degraded, "decoder")
        if not decoder or not names(degraded, "encoder"):
            raise InputError(
                f"teacher.taps: method slkd needs taps named enc... and dec..., but the teacher has {', '.join(degraded) or 'none'}: "
                "take a U-shaped network, or name such taps in teacher.taps and student.taps"
            )
        return degraded | {name: clean[name] for name in decoder}

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, degraded_taps = teachers["degraded"](batch.lq)
        _, clean_taps = teachers["clean"](batch.gt)
        return {
            "pixel": l1_loss(restored, batch.gt),
            "kl": divergence(restored, imitated, self.options.temperature),
            "nc": self.compare(self.natural, student_taps, degraded_taps, "encoder"),
            "et": self.compare(self.texture, student_taps, clean_taps, "decoder"),
        }

    def compare(self, extract: Extractor, student: Features, teacher: Features, group: str) -> Tensor:
        """(1 / K) sum_k mean | e(SCM(S_k)) - e(SCM(T_k)) | over the taps of a group."""
        found = []
        for name in names(teacher, group):
            pair = zip(extract(self.convert(student[name])), extract(self.convert(teacher[name])), strict=True)
            found.append(torch.stack([l1_loss(ours, theirs) for ours, theirs in pair]).mean())
        return torch.stack(found).mean()

    def convert(self, tap: Tensor) -> Tensor:
        """The scale conversion module: (m, C, h, w) -> (m, 1, size, size) in [0, 255]."""
        size = (self.options.size, self.options.size)
        resized = interpolate(tap.mean(dim=1, keepdim=True), size, mode="bilinear", align_corners=False)
        return resized.sigmoid() * PIXEL_RANGE

    def natural(self, image: Tensor) -> list[Tensor]:
        """e_B: (m, 1, H, W) -> what BRISQUE is made of."""
        if self.options.natural == "features":
            return [kdops.brisque_features(image)]
        normalised, _ = kdops.mscn(image)
        return (
            [normalised]
            if self.options.natural == "mscn"
            else [torch.cat([normalised, nss.paired_products(normalised)], dim=1)]
        )

    def texture(self, image: Tensor) -> list[Tensor]:
        """e_P: (m, 1, H, W) -> what PIQE is made of."""
        normalised, _ = kdops.mscn(image, padding="replicate")
        variance = nss.block_variance(normalised)
        return [variance] if self.options.texture == "variance" else [variance, nss.edge_deviations(normalised)]


def names(features: Features, group: str) -> list[str]:
    """The taps of a group."""
    return [name for name in features if taps.tap_group(name) == group]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / t) || softmax(student / t)) over the flattened pixels of each image, a mean over images."""
    ours, theirs = ((image.flatten(1) / temperature).log_softmax(dim=1) for image in (student, teacher))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True)
