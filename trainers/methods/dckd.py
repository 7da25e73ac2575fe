"""DCKD: dynamic contrastive knowledge distillation (Zhou et al., AAAI 2025, arXiv 2412.08939)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

import kdops
from trainers.features import AnyFeatureOptions, build
from trainers.features.codec import CodecOptions
from trainers.fields import Fixed, Section, Weight
from trainers.methods.augmentation import Augmentation
from trainers.methods.base import Batch, Method, MethodOptions, Network, Requirements, Run
from trainers.methods.image_contrast import contrast
from trainers.methods.negatives import Negatives, degrade

AUGMENTED = 0.5  # probability of each augmentation of label consistency
PHASE = 100_000  # steps after which the history model is updated more rarely


class DCKDWeights(Section):
    """Weights of the losses."""

    pixel: Weight = 1.0
    """Weight of the L1 distance between student and ground truth."""
    output: Weight = 1.0
    """Weight of the L1 distance between student and teacher."""
    contrast: Weight = 0.003
    """Weight of the dynamic contrastive loss: our reading for small encoders; DCKD takes 0.1 with its VQGAN."""
    codebook: Weight = Fixed(value=0.001, ramp=1000)
    """Weight of the cross-entropy over the codebook, as DCKD's, ramped (our reading): at first it has 27 to 40 times pixel's gradient."""
    label_consistency: Weight = 1.0
    """Weight of the L1 distance between student and the teacher's un-augmented output; used with label_consistency alone."""


class DCKDOptions(MethodOptions):
    """DCKD: contrast with what the student itself was a while ago, and its choice of codes."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["dckd"]
    """The method."""
    weights: DCKDWeights = DCKDWeights()
    """Weights of the losses."""
    features: AnyFeatureOptions = CodecOptions()
    """The network with a codebook in whose features images are compared: codec, which ships with the package, or DCKD's vqgan."""
    negatives: Negatives = Negatives()
    """How the history model's inputs are degraded."""
    history_decay: float = Field(default=0.1, ge=0, le=1)
    """What remains of the history model at an update; the rest is the student's moving average."""
    history_every: list[int] = Field(default=[1000, 2000, 3000], min_length=1)
    """Steps between updates: for the first 100,000 steps, the second, and so on; the last one stays."""
    mapping: Literal["paper", "released_code"] = "paper"
    """Cross-entropy over the codes: the paper's, or the code's, which takes the softmax of the student's probabilities once more."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the squared distances to the codes."""
    label_consistency: bool = False
    """DCKD*: the student also imitates the teacher's answer to an augmented input (that plain DCKD goes without is our reading)."""
    eps: float = Field(default=1e-3, gt=0)
    """Smallest denominator of the contrast, relative to the positive's features (our reading; the code has 1e-7, absolute)."""

    def refusals(self, run: Run) -> list[tuple[str, str]]:
        found = [(f"features.{key}", text) for key, text in self.features.problems(run.patch)]
        if not self.features.has_codebook:
            found.append(
                ("features.name", f"needs a network with a codebook, which {self.features.name} has not: codec, vqgan")
            )
        problem = self.negatives.problem()
        if problem:
            found.append(("negatives", problem))
        if min(self.history_every) < 1:
            found.append(("history_every", "needs numbers of at least 1"))
        return found


class DCKD(Method):
    r"""L = L_pix + L_logits + w_cl L_dcl + w_ce L_ce (+ L_lcr) (methods.md 3a).

    - pixel, output: L1(s, y) and L1(s, t).
    - contrast: L_dcl = sum_l w_l mean |f_l(s) - f_l(t)| / (sum_n mean |f_l(s) - f_l(neg_n)| + eps), per sample (our reading: the code
      divides means over the batch, which would couple its samples). neg_n = F_his(D_n(x)) for the input itself and N degraded
      copies, so that N + 1 terms are summed; f_l are the maps of a frozen encoder.
    - F_his is the history model: a copy of the student that moves to its moving average, theta_his <- 0.1 theta_his + 0.9 theta_ema
      (parameters alone), every 1,000 steps, later 2,000 and 3,000. It is part of the checkpoint: without, a resumed run
      would be another one (the released code does not save it, and stops at step 300,000 for want of a fourth interval).
    - codebook: L_ce over C = softmax_k(-||z - e_k||^2), z the encoder's latent. `paper`: -sum C_T log C_S. `released_code` feeds the
      probabilities C_S to a cross-entropy that takes their log-softmax: with 1,024 codes it lies between 5.93 and 6.94.
    - label_consistency: L1(s, a^-1(F_T(a(x)))), a random invertible augmentations, undone in reverse order.

    At the start the history model is the student, so that only the degraded negatives keep the denominator from 0: options that may
    leave them undegraded are refused.
    """

    def __init__(self, options: DCKDOptions) -> None:
        super().__init__()
        self.options = options
        self.features = build(options.features)
        self.history = nn.Module()  # the student's copy, from `prepare` on
        self.losses = ("pixel", "output", "contrast", "codebook")
        if options.label_consistency:
            self.losses += ("label_consistency",)

    def requirements(self) -> Requirements:
        return Requirements(teachers=("teacher",))

    def prepare(self, student: nn.Module) -> None:
        self.history = copy.deepcopy(student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> DCKD:
        super().train(mode)
        self.history.eval()
        return self

    @torch.no_grad()
    def after_step(self, step: int, average: Callable[[], nn.Module]) -> None:
        phases = self.options.history_every
        if step % phases[min((step - 1) // PHASE, len(phases) - 1)] == 0:
            theirs = [parameter.data for parameter in self.history.parameters()]
            torch._foreach_lerp_(theirs, list(average().parameters()), 1 - self.options.history_decay)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        restored, _ = student(batch.lq)
        imitated, _ = teachers["teacher"](batch.lq)
        with torch.no_grad():
            positive = self.features(imitated)
            negatives = self.negatives(batch)
        anchor = self.features(restored)
        losses = {
            "pixel": l1_loss(restored, batch.gt),
            "output": l1_loss(restored, imitated),
            # The op's mean over the negatives is the formula's sum, divided by their number.
            "contrast": contrast(anchor.levels, positive.levels, negatives, self.options.eps).mean()
            / negatives[0].shape[1],
            "codebook": self.codebook_loss(anchor.latent, positive.latent),
        }
        if self.options.label_consistency:
            augmentation = Augmentation(batch.generators("dckd label consistency"), AUGMENTED, batch.lq.device)
            consistent = augmentation.undo(teachers["teacher"](augmentation(batch.lq))[0])
            losses["label_consistency"] = l1_loss(restored, consistent)
        return losses

    def negatives(self, batch: Batch) -> list[Tensor]:
        """f_l of F_his(x) and of F_his(D_n(x)): L maps (m, N + 1, C, h, w)."""
        inputs = []
        for image, generator in zip(batch.lq, batch.generators("dckd negatives"), strict=True):
            copies = [degrade(image, self.options.negatives, generator) for _ in range(self.options.negatives.count)]
            inputs.append(torch.stack([image, *copies]))
        restored = self.history(torch.cat(inputs))
        return [level.unflatten(0, (len(batch.lq), -1)) for level in self.features(restored).levels]

    def codebook_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_ce of the latents (m, D, h, w)."""
        codebook = self.features.codebook
        assert codebook is not None  # DCKDOptions.refusals saw to it
        if self.options.mapping == "paper":
            return kdops.codebook_cross_entropy(student, teacher, codebook, temperature=self.options.temperature)
        return cross_entropy(self.choice(student, codebook), self.choice(teacher, codebook))

    def choice(self, latent: Tensor, codebook: Tensor) -> Tensor:
        """C: (m, D, h, w) -> probabilities of the codes (m h w, K)."""
        rows = latent.movedim(1, -1).flatten(0, 2)
        distances = kdops.pairwise_distance(rows, codebook.to(rows.dtype), p=2, statistic="sum")
        return (-distances / self.options.temperature).softmax(dim=1)
