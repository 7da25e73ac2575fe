"""Helpers of the contract tests: which cases there are, and how a case is run and recorded. An op joins by its spec alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdops  # noqa: F401  (registers the ops)
from kdops.dispatch import SPECS, OpSpec, Sample

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """One op on one backend with one sample."""

    spec: OpSpec
    backend: str
    sample: Sample

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.backend}-{self.sample.name}"

    @property
    def device(self) -> str:
        return "cuda" if self.backend == "cuda" or (self.backend == "triton" and GPU) else "cpu"

    @property
    def differentiable(self) -> bool:
        return self.spec.no_gradient is None

    def inputs(self, dtype: torch.dtype = torch.float32, requires_grad: bool = True, seed: int = 0) -> list[Tensor]:
        """Normal inputs, rounded to `dtype`: the same values for every backend and device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.sample.shapes]
        return [t.to(self.device, dtype).requires_grad_(requires_grad) for t in drawn]

    def call(self, *tensors: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        """The results of the public function, one or several, on this case's backend unless another is named."""
        kwargs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self.sample.kwargs.items()}
        out = self.spec.function(*self.sample.arguments(tensors), **kwargs, backend=backend or self.backend)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def upstream(self, outs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
        """A random gradient for each result."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outs]

    def backward(
        self, outs: tuple[Tensor, ...], tensors: list[Tensor], seed: int = 1, retain_graph: bool = False
    ) -> list[Tensor]:
        """The gradients, for a random upstream gradient, of every input that requires one; none of results that have none."""
        if not self.differentiable:
            return []
        wanted = [t for t in tensors if t.requires_grad]
        return list(torch.autograd.grad(outs, wanted, self.upstream(outs, seed), retain_graph=retain_graph))

    def gradients(
        self, tensors: list[Tensor], backend: str | None = None, seed: int = 1
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The results and the gradients of every input that requires one."""
        outs = self.call(*tensors, backend=backend)
        return tuple(out.detach() for out in outs), self.backward(outs, tensors, seed)

    def second_gradients(self, backend: str | None = None) -> list[Tensor]:
        """The gradients of the gradients' squares."""
        given = self.inputs()
        grads = torch.autograd.grad(
            sum(out.sum() for out in self.call(*given, backend=backend)), given, create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), given))


def cases() -> list[Case]:
    """Every op x backend x sample that this machine can run."""
    return [
        Case(spec, b.name, sample)
        for spec in SPECS.values()
        for b in spec.backends
        if not _reason(spec, b.name)
        for sample in spec.samples
    ]


def missing() -> Iterator[tuple[OpSpec, str, str]]:
    """Every op x backend that it cannot run, with the reason."""
    for spec in SPECS.values():
        for b in spec.backends:
            reason = _reason(spec, b.name)
            if reason:
                yield spec, b.name, reason


def _reason(spec: OpSpec, backend: str) -> str | None:
    case = Case(spec, backend, spec.samples[0])
    if case.device == "cuda" and not GPU:
        return "needs a CUDA device"
    return spec.backend(backend).supports(case.inputs())


class Operators(TorchDispatchMode):
    """Names of the operators that run beneath it, but for views; on a GPU nearly each of torch's is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class RecordOps(TorchDispatchMode):
    """Records the kdops operators that run beneath it, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "kdops":
            self.calls.append((func, args, out))
        return out


def relative_error(measured: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """Largest absolute error, relative to the largest exact value, or to `scale` where all are 0; of yes and no, infinite unless equal."""
    if exact.dtype == torch.bool:
        return 0.0 if torch.equal(measured, exact) else float("inf")
    if exact.numel() == 0:
        return 0.0
    found = largest([exact]) or scale or 1e-300
    return float((measured.to(exact) - exact).detach().abs().max() / found)


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest finite magnitude of all."""
    return max((float(t[t.isfinite()].double().abs().amax()) for t in tensors if t.isfinite().any()), default=0.0)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values in other strides. The axes that are moved are the features'; `batch last` moves the rows' axis too."""
    axes = list(range(t.ndim))
    permuted = t.permute(axes[::-1]).contiguous().permute(axes[::-1])
    swapped = t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 2 else t
    wide = torch.zeros((*t.shape[:-1], 2 * t.shape[-1] + 1), dtype=t.dtype, device=t.device)
    wide[..., 1::2] = t
    found = {"batch last": permuted, "swapped": swapped, "strided": wide[..., 1::2]}
    if t.ndim == 4:
        found["channels_last"] = t.contiguous(memory_format=torch.channels_last)
    return found
