"""The weights of the loss terms: numbers, ramps, and shares of the pixel term's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from trainers.fields import Fixed, Section, Share
from trainers.methods import Batch
from trainers.step import TrainStep


class LossWeights:
    """The weight of each term at each step.

    A term with {share: s} weighs s * w_pixel * |g_pixel| / |g_term|, where |g| is the norm of the term's gradient over
    the student's parameters when it was last measured (every train.share_every steps). A feature term's gradient may
    grow 40 times against the pixel term's during one training (methods.md 8), so no fixed number keeps its share.
    """

    def __init__(self, options: Section) -> None:
        self.options: dict[str, float | Fixed | Share] = dict(options)
        self.ratios: dict[str, float] = {}
        """|g_term| / |g_pixel| of the unweighted terms, as last measured."""

    @property
    def measured_terms(self) -> list[str]:
        """The terms whose share is measured: all but the pixel term."""
        return [name for name in self.options if name != "pixel"]

    def at(self, step: int) -> dict[str, float]:
        """The weights in step `step` (from 0)."""
        return {name: self._weight(name, step) for name in self.options}

    def shares(self, step: int) -> dict[str, float]:
        """Each term's gradient relative to the pixel term's, both weighted as in step `step`, as last measured."""
        weights = self.at(step)
        if not weights["pixel"]:
            return {}
        return {name: weights[name] * ratio / weights["pixel"] for name, ratio in self.ratios.items()}

    def update(self, norms: Mapping[str, float]) -> None:
        """Takes measured gradient norms of all terms. A term without a gradient, or beside a pixel term without, keeps its ratio.

        The config may hold weights of terms that the method, by its options, does not have: they have no norm.
        """
        pixel = norms["pixel"]
        for name in self.measured_terms:
            if pixel > 0 and norms.get(name, 0) > 0 and math.isfinite(norms[name] / pixel):
                self.ratios[name] = norms[name] / pixel

    def state(self) -> dict[str, Any]:
        return {"ratios": dict(self.ratios)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.ratios = {name: ratio for name, ratio in state["ratios"].items() if name in self.options}

    def _weight(self, name: str, step: int) -> float:
        option = self.options[name]
        if isinstance(option, (int, float)):
            return float(option)
        ramp = min(1.0, (step + 1) / option.ramp) if option.ramp else 1.0
        if isinstance(option, Fixed):
            fallen = min(1.0, (step + 1) / option.decay) if option.decay else 0.0
            return (option.value + (option.final - option.value) * fallen) * ramp
        ratio = self.ratios.get(name)
        return 0.0 if ratio is None else option.share * ramp * self._weight("pixel", step) / ratio


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum of weight * loss."""
    total = sum(weights[name] * loss for name, loss in losses.items())
    assert isinstance(total, Tensor)
    return total


def gradient_norms(fabric: Fabric, train_step: TrainStep, batches: Sequence[Batch]) -> dict[str, float]:
    """Norm of each unweighted term's gradient over the student's parameters, for the whole effective batch.

    An extra forward pass, and a backward pass per term, of the module itself and not of Fabric's wrapper, which would
    exchange gradients.
    """
    parameters = [p for p in train_step.student.parameters() if p.requires_grad]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with fabric.autocast():
            losses = train_step(batch)
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    torch.zeros_like(p).flatten() if gradient is None else gradient.flatten()
                    for p, gradient in zip(parameters, found, strict=True)
                ]
            )
            sums[name] = sums[name] + flat if name in sums else flat
    means = {name: fabric.all_reduce(total / len(batches), reduce_op="mean") for name, total in sums.items()}
    return {name: float(torch.linalg.vector_norm(mean)) for name, mean in means.items()}
