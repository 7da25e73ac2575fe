"""Features by module path, and the 1x1 adapters that bring the student's to the teacher's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trainers.errors import InputError
from trainers.methods.base import Features

RIDGE = 1e-6  # of the mean diagonal of the normal equations: keeps dead or duplicate channels solvable


class Tapped:
    """A network with taps: x -> (output, {tap name: the output of the module at its path})."""

    def __init__(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        wrong = tap_problems(network, paths)
        if wrong:
            raise InputError(wrong)
        self.network = network
        self.paths = dict(paths)

    def __call__(self, x: Tensor) -> tuple[Tensor, Features]:
        kept: dict[str, object] = {}
        # Hooks live for one call: copies of the network (the EMA) carry none, and no graph outlives its step here.
        handles = [
            self.network.get_submodule(path).register_forward_hook(partial(_keep, kept, name))
            for name, path in self.paths.items()
        ]
        try:
            output: Tensor = self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        return output, {name: _feature_map(name, path, kept.get(name)) for name, path in self.paths.items()}


def tap_group(name: str) -> str:
    """Where a tap lies, told by how its name begins: enc "encoder", latent "latent", dec "decoder", all others "body".

    A method that teaches encoder and decoder different things chooses its taps so; the taps of every U-shaped network of
    `trainers.models` are named so.
    """
    return {"enc": "encoder", "lat": "latent", "dec": "decoder"}.get(name[:3], "body")


def _keep(kept: dict[str, object], name: str, module: nn.Module, inputs: object, output: object) -> None:
    kept[name] = output


def _feature_map(name: str, path: str, output: object) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    given = "was not run" if output is None else f"gives {_describe(output)}"
    raise InputError(f"tap {name}: module {path} {given}, but a tap must give a feature map (B, C, H, W)")


def _describe(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def tap_problems(network: nn.Module, paths: Mapping[str, str]) -> list[str]:
    """A message, with the nearest names, for every path that is no module of the network."""
    modules = [name for name, _ in network.named_modules() if name]
    found = []
    for name, path in paths.items():
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4) or modules[:3]
            found.append(f"tap {name}: there is no module {path}; nearest: {', '.join(near)}")
    return found


class Adapters(nn.Module):
    """Puts the taps of student and teacher on one scale: adapt(student) is trained to resemble normalise(teacher).

    Per tap: the student's map passes a 1x1 convolution to the teacher's channels (trained, dropped at test time), and
    the teacher's is divided by its RMS over the first batch. `calibrate` sets the RMS, and each convolution to the
    least-squares solution on that batch (our reading, methods.md 8: without them no loss weight fits two networks).

    Args:
        student, teacher: taps of one forward pass on the same input, to measure the shapes.

    Raises:
        InputError: taps whose names or sizes differ.
    """

    rms: Tensor

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        wrong = _mismatches(student, teacher)
        if wrong:
            raise InputError(wrong)
        self.names = list(teacher)
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv2d(student[name].shape[1], teacher[name].shape[1], 1) for name in self.names}
        )
        self.register_buffer("rms", torch.ones(len(self.names)))

    def adapt(self, student: Features) -> Features:
        return {name: self.convolutions[name](student[name]) for name in self.names}

    def normalise(self, teacher: Features) -> Features:
        return {
            name: teacher[name] / rms.to(teacher[name].dtype) for name, rms in zip(self.names, self.rms, strict=True)
        }

    @torch.no_grad()
    def calibrate(self, samples: Iterable[tuple[Features, Features]]) -> None:
        """Sets RMS and convolutions from raw taps of student and teacher, sample by sample: the result does not depend on any split."""
        squares = torch.zeros(len(self.names), dtype=torch.float64)
        counts = torch.zeros_like(squares)
        gram: Features = {}  # A^T A, with A the student's features and a column of ones: (Cs + 1, Cs + 1)
        right: Features = {}  # A^T Y, with Y the teacher's features: (Cs + 1, Ct)
        for student_taps, teacher_taps in samples:
            for index, name in enumerate(self.names):
                y = _rows(teacher_taps[name])
                a = _rows(student_taps[name])
                a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
                squares[index] += y.square().sum()
                counts[index] += y.numel()
                gram[name] = gram.get(name, 0) + a.T @ a
                right[name] = right.get(name, 0) + a.T @ y
        rms = (squares / counts).sqrt().clamp(min=1e-12)
        self.rms.copy_(rms)
        for scale, name in zip(rms, self.names, strict=True):
            ridge = RIDGE * gram[name].diagonal().mean() * torch.eye(len(gram[name]), dtype=torch.float64)
            solution = torch.linalg.solve(gram[name] + ridge, right[name]) / scale
            convolution = self.convolutions[name]
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            convolution.weight.copy_(solution[:-1].T[:, :, None, None])
            convolution.bias.copy_(solution[-1])


def _rows(feature: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), float64 on the CPU."""
    return feature.detach().to("cpu", torch.float64).movedim(1, -1).flatten(0, 2)


def _mismatches(student: Features, teacher: Features) -> list[str]:
    if set(student) != set(teacher):
        return [f"student taps {', '.join(student)}, but teacher taps {', '.join(teacher)}: give both the same names"]
    return [
        f"tap {name}: the student's is {tuple(student[name].shape)} and the teacher's {tuple(teacher[name].shape)}: "
        "tap both where height and width agree"
        for name in teacher
        if student[name].shape[-2:] != teacher[name].shape[-2:]
    ]
