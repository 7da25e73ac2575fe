"""TrainStep: everything trainable in one module, which turns a micro-batch into named losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainers.methods.base import Batch, Features, Method, Network
from trainers.taps import Adapters, Tapped


class TrainStep(nn.Module):
    """The one module that Fabric sets up: student, adapters and the method's own parameters.

    A trainable part outside of it would silently drift apart across devices. The frozen teachers stay outside: they
    have no gradients to exchange and belong in no checkpoint.
    """

    def __init__(
        self, student: Tapped, method: Method, adapters: Adapters | None, teachers: Mapping[str, Tapped]
    ) -> None:
        super().__init__()
        self.student = student.network
        self.method = method
        self.adapters = adapters
        self.tapped_student = student
        self.tapped_teachers = dict(teachers)
        self.teachers: dict[str, Network] = {name: self._frozen(teacher) for name, teacher in teachers.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.method(batch, self._adapted_student, self.teachers)
        return losses

    def others(self) -> dict[str, Tensor]:
        """The state besides the student's: adapters, calibration, the method's own."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("student.")}

    def frozen_modules(self) -> list[nn.Module]:
        """The networks outside of this module: what they weigh is memory too."""
        return [teacher.network for teacher in self.tapped_teachers.values()]

    def _adapted_student(self, x: Tensor) -> tuple[Tensor, Features]:
        output, taps = self.tapped_student(x)
        return output, self.adapters.adapt(taps) if self.adapters else taps

    def _frozen(self, teacher: Tapped) -> Network:
        @torch.no_grad()
        def frozen(x: Tensor) -> tuple[Tensor, Features]:
            output, taps = teacher(x)
            return output, self.adapters.normalise(taps) if self.adapters else taps

        return frozen
