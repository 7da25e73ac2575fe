"""SKD: soft knowledge distillation with multi-dimensional cross-net attention (Zhang & Yan, ICASSP 2025, arXiv 2501.09321)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, Tag
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, l1_loss, normalize

import kdops
from trainers.features import AnyFeatureOptions, build
from trainers.features.codec import CodecOptions
from trainers.fields import Fixed, Section, Weight, shape_of
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements, Run
from trainers.methods.image_contrast import contrast, degraded

Temperature = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[Literal["sqrt"], Tag("text")],
    shape_of("a number above 0, or sqrt"),
]
Sigma = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[Literal["teacher", "adaptive"], Tag("text")],
    shape_of("a number above 0, teacher or adaptive"),
]


class SKDWeights(Section):
    """Weights of the losses. The paper's three weights are not known; these are our reading (methods.md 8)."""

    pixel: Weight = 1.0
    """Weight of L_REC, the L1 distance between student and ground truth."""
    feature: Weight = 0.005
    """Weight of the Gaussian-kernel distance between the taps themselves: alpha_2."""
    channel: Weight = 0.005
    """Weight of the distance after attention between channels: alpha_2 alpha_1."""
    spatial: Weight = 0.005
    """Weight of the distance after attention between positions: alpha_2 alpha_1."""
    contrast: Weight = Fixed(value=3e-4, ramp=1000)
    """Weight of the image-level contrastive loss: alpha_3, ramped, because a residual student starts at the negative."""


class SKDOptions(MethodOptions):
    """SKD: the student's features, re-assembled by attention to the teacher's, imitate the teacher's in a kernel space."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["skd"]
    """The method."""
    weights: SKDWeights = SKDWeights()
    """Weights of the losses."""
    query: Literal["student", "teacher"] = "student"
    """Who asks in the attention between positions: student is eq. (2), teacher mirrors eq. (1) (our reading)."""
    normalize: Literal["key", "query"] = "key"
    """Softmax of the attention between positions: over the positions of the key (our reading) or of the query (a literal dim=-1)."""
    logits: Literal["cosine", "dot"] = "cosine"
    """Products of unit vectors (our reading), or of the features as they are."""
    channel_temperature: Temperature = 0.05
    """lambda of eq. (1): our reading; sqrt is the root of the number of positions; 1e-6 is the one number of the paper."""
    spatial_temperature: Temperature = 0.02
    """lambda of eq. (2): our reading; sqrt is the root of the number of channels; 1e-6 is the one number of the paper."""
    sigma: Sigma = "teacher"
    """Width of the kernel: the deviation of the teacher's tap on the first batch (our reading), a number, or adaptive (batch mean)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Pools taps with more positions than this before the attention between positions; null never does (our reading)."""
    features: AnyFeatureOptions = CodecOptions()
    """The network in whose features images are compared (our reading: vgg19 as in AECR-Net; the default ships with the package)."""
    positive: Literal["teacher", "gt"] = "teacher"
    """What the student's image is pulled to: the teacher's image (our reading) or the ground truth."""
    eps: float = Field(default=1e-3, gt=0)
    """Smallest denominator of the contrast, relative to the positive's features (our reading)."""

    @property
    def indivisible(self) -> str | None:
        return "its adaptive sigma is a mean over the student's whole batch" if self.sigma == "adaptive" else None

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        return [(f"features.{key}", text) for key, text in self.features.problems(run.patch)]


class SKD(Method):
    r"""L = L_REC + alpha_2 L_GK + alpha_3 L_CL, eq. (6) (methods.md 1). S and T are a tap of student (adapted) and teacher, C x N.

    (1) S_fc = softmax(T S^T / lambda_c) S                channel attention, softmax over the last axis (our reading)
    (2) S_ft = S softmax(T^T S / lambda_s)                attention between positions; columns sum to 1 (our reading)
    (3) GK(x, y) = 1 - exp(-d(x, y) / (2 sigma^2))        d the mean squared difference: of the sum the gradient is 0 (our reading)
    (4) L_GK = GK(S, T) + alpha_1 (GK(S_fc, T) + GK(S_ft, T)), a mean over taps (our reading), here as `feature`, `channel`, `spatial`
    (5) L_REC = ||G - S_r||_1                             `pixel`

    L_CL is not published. `contrast` is AECR-Net's form (our reading): the student's image, the teacher's as positive, the degraded one
    as negative, with a relative eps. It takes the place of an L1 or KL term between the images, so there is no `output`.

    With S = T cosine logits at 0.05 and 0.02 leave next to nothing; sqrt(C) makes uniform weights, sqrt(N) depends on the patch, and
    1e-6 is an arg-max without gradient (methods.md 8). No map of N x N is held (kdops.spatial_attention).
    """

    losses = ("pixel", "feature", "channel", "spatial", "contrast")

    def __init__(self, options: SKDOptions) -> None:
        super().__init__()
        self.options = options
        self.features = build(options.features)
        # Measured, of the taps; plain numbers: a tensor's would have to be fetched from the device in each step.
        self.sigmas: list[float] = []

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",), taps=True)

    def calibrate(self, samples: Iterable[tuple[Tensor, Tensor]], teachers: Mapping[str, Network]) -> None:
        """sigma^2 = variance of each of the teacher's taps over the first batch. A resume may change the option: it is not asked here."""
        moments = []
        for lq, _ in samples:
            taps = [tap.double() for tap in teachers["teacher"](lq)[1].values()]
            moments.append(torch.stack([torch.stack([tap.mean(), tap.square().mean()]) for tap in taps]))
        mean, square = torch.stack(moments).mean(dim=0).unbind(dim=1)  # (T,) each; all samples have the same size
        self.sigmas = (square - mean.square()).clamp(min=1e-12).sqrt().tolist()

    def get_extra_state(self) -> list[float]:
        return self.sigmas

    def set_extra_state(self, state: list[float]) -> None:
        self.sigmas = state

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, student_taps = student(batch.lq)
        imitated, teacher_taps = teachers["teacher"](batch.lq)
        taps = [(student_taps[name], teacher_taps[name]) for name in teacher_taps]
        pooled = [(self.pooled(s), self.pooled(t)) for s, t in taps]
        return {
            "pixel": l1_loss(restored, batch.gt),  # (5)
            "feature": self.kernel(taps),
            "channel": self.of_distances([self.channel_distance(s, t) for s, t in taps]),
            "spatial": self.kernel([(self.spatial(s, t), t) for s, t in pooled]),
            "contrast": self.contrast(restored, imitated, batch),
        }

    def kernel(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean over taps and samples of GK(x_j, y_j), (3)."""
        x, y = zip(*pairs, strict=True)
        adaptive = self.options.sigma == "adaptive"
        return kdops.gaussian_distance(x, y, sigma="adaptive" if adaptive else self.widths(len(x))).mean()

    def of_distances(self, distances: list[Tensor]) -> Tensor:
        """The same from the mean squared differences (B,) of each tap."""
        if self.options.sigma == "adaptive":
            variances: list[Tensor | float] = [distance.detach().mean() + 1e-12 for distance in distances]
        else:
            variances = [sigma**2 for sigma in self.widths(len(distances))]
        pairs = zip(distances, variances, strict=True)
        return torch.stack([-torch.expm1(-distance / (2 * variance)) for distance, variance in pairs]).mean()

    def widths(self, taps: int) -> list[float]:
        """sigma of each tap: the option's number, or as measured; 1 before calibration, for `kdtrain plan`."""
        if isinstance(self.options.sigma, float):
            return [self.options.sigma] * taps
        return self.sigmas or [1.0] * taps

    def channel_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """mean (S_fc - T)^2 per sample, (1): (B, C, h, w) twice -> (B,). S_fc is not kept."""
        query, key = teacher, student
        if self.options.logits == "cosine":
            query, key = (normalize(tap.flatten(2), dim=2).view_as(tap) for tap in (teacher, student))
        scale = inverse(self.options.channel_temperature)
        return kdops.channel_attention_distance(query, key, student, teacher, scale=scale)

    def spatial(self, student: Tensor, teacher: Tensor) -> Tensor:
        """S_ft, (2), or with the teacher as query: (B, C, h, w) twice -> (B, C, h, w)."""
        query, key = (student, teacher) if self.options.query == "student" else (teacher, student)
        if self.options.logits == "cosine":
            query, key = normalize(query, dim=1), normalize(key, dim=1)
        scale = inverse(self.options.spatial_temperature)
        return kdops.spatial_attention(query, key, student, scale=scale, normalize=self.options.normalize)

    def pooled(self, tap: Tensor) -> Tensor:
        height, width = tap.shape[2:]
        most = self.options.max_tokens
        if most is None or height * width <= most:
            return tap
        shrink = sqrt(most / (height * width))
        return adaptive_avg_pool2d(tap, (max(1, int(height * shrink)), max(1, int(width * shrink))))

    def contrast(self, restored: Tensor, imitated: Tensor, batch: Batch) -> Tensor:
        """L_CL: pulled to the teacher's image (or the ground truth), pushed from the degraded one."""
        scale = batch.gt.shape[-1] // batch.lq.shape[-1]
        with torch.no_grad():
            positive = self.features(imitated if self.options.positive == "teacher" else batch.gt).levels
            negative = [level.unsqueeze(1) for level in self.features(degraded(batch.lq, scale)).levels]
        return contrast(self.features(restored).levels, positive, negative, self.options.eps).mean()


def inverse(temperature: float | str) -> float | None:
    """The factor of the logits; None is the op's own, one over the root."""
    return 1 / temperature if isinstance(temperature, float) else None
