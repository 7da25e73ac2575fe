"""How a raw operator is declared to torch: one schema, fake and autograd formula, shared by every backend that implements it.

`kdops::<name>` is implemented in C++ (CPU and CUDA keys) or, on the CPU, in Python that calls torch's matrix products between C++ kernels.
`kdops::<name>_triton` is implemented in Triton (CUDA, and the CPU under the interpreter).
They are two operators and not one so that a forced backend stays visible in a compiled graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks

LIBRARY = torch.library.Library("kdops", "FRAGMENT")
_suffixes: dict[str, list[str]] = {}  # of every declared name: "", and "_triton" where that backend exists

Op = Callable[..., Any]


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    triton_module: str | None = None,
    cpu_module: str | None = None,
    triton_fake: Callable[..., Any] | None = None,
) -> None:
    """Declare `kdops::<name>` with `schema` (what follows the name) and the fake `fake`, and `kdops::<name>_triton` with the same.

    `triton_fake` is the fake of the latter where it keeps something else for backward.

    Implementations in Python are the function `name` of `triton_module` and of `cpu_module`, imported at their first call.
    Without `triton_module` there is no operator with that suffix; without `cpu_module` the CPU's implementation is in C++.
    """
    for suffix in ("", "_triton") if triton_module else ("",):
        LIBRARY.define(f"{name}{suffix}{schema}")
        torch.library.register_fake(f"kdops::{name}{suffix}", (suffix and triton_fake) or fake, lib=LIBRARY)
        _suffixes.setdefault(name, []).append(suffix)
    if triton_module:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(f"{name}_triton", _lazy(triton_module, name), key)
    if cpu_module:
        LIBRARY.impl(name, _in_given_dtypes(_lazy(cpu_module, name)), "CPU")


def accumulator(t: Tensor) -> torch.dtype:
    """What kernels accumulate in and keep statistics in: float32, or float64 for float64 inputs."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def gradient_like(t: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """What a backward operator returns for the input `t`, unwritten: its dense strides, or no elements where nobody asked."""
    return torch.empty_like(t, dtype=dtype) if needed else t.new_empty(0, dtype=dtype)


def op(name: str, suffix: str = "") -> Op:
    """The callable operator `kdops::<name><suffix>`, its overload bound once."""
    overload: Op = getattr(torch.ops.kdops, name + suffix).default
    return overload


def forward_of(backward: Any) -> Op:
    """The operator whose gradient the operator `kdops::<name>_backward<suffix>` computes, of the same backend."""
    return op(backward.name().removeprefix("kdops::").replace("_backward", "", 1))


def differentiate(
    name: str, setup_context: Callable[..., None], backward: Callable[[Op], Callable[..., Any]], no_double_backward: str
) -> None:
    """Give `name` the gradient that its operator `<name>_backward` of the same backend computes.

    `backward(op)` returns the autograd formula that calls `op`. The backward operator itself raises when it is differentiated:
    without a formula torch would only warn and return a wrong second derivative.
    """

    why = f"{name}: no double backward, because {no_double_backward}; pass backend='reference' to differentiate twice."
    for suffix in _suffixes[name]:
        gradient = op(f"{name}_backward", suffix)
        torch.library.register_autograd(
            f"kdops::{name}{suffix}", backward(gradient), setup_context=setup_context, lib=LIBRARY
        )
        LIBRARY.impl(f"{name}_backward{suffix}", _refusing(gradient, why), "Autograd")


class _Refused(torch.autograd.Function):
    """Runs an operator, and raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, run: Op, why: str, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.why = why
        return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(ctx.why)


def _refusing(overload: Op, why: str) -> Op:
    """What register_autograd would make of a formula that raises, without the 1.5 ms that each such call adds to the import."""

    def call(*arguments: Any) -> Any:
        _refuse_tangents(overload, arguments)
        tensors = _differentiable(arguments)
        return _Refused.apply(run, why, arguments, *tensors) if tensors else run(*arguments)  # type: ignore[no-untyped-call]

    run = _below_autograd(overload)
    return call


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments and lists of them."""
    flat = (t for a in arguments for t in (a if isinstance(a, list) else [a]))
    return (t for t in flat if isinstance(t, Tensor))


def _differentiable(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Those, if any of them is to be differentiated; else none."""
    if not torch.is_grad_enabled():
        return []
    tensors = list(_tensors(arguments))
    return tensors if any(t.requires_grad for t in tensors) else []


def _refuse_tangents(overload: Any, arguments: tuple[Any, ...]) -> None:
    """A backward operator would drop the tangent of an upstream gradient without a word."""
    if checks.any_tangent(_tensors(arguments)):
        raise NotImplementedError(
            f"{overload.name()}: it has no forward-mode derivative; pass backend='reference' for dual tensors in a backward pass."
        )


def _below_autograd(overload: Op) -> Op:
    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    return run


def differentiate_lists(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[[Op], Callable[..., Any]],
    setup_twice: Callable[..., None],
    backward_twice: Callable[..., Any],
) -> None:
    """As `differentiate`, for an operator from lists of tensors to tensors whose backward operator has an analytic derivative of its own.

    `backward(op)` finds all tensors of the lists in one row in `ctx.needs_input_grad`, and returns their gradients in one row: torch's
    own support of lists walks nested structures in Python, which took 0.1 ms for each pass over ten taps, as much as the kernel.
    """
    for suffix in _suffixes[name]:
        gradient = backward(_shortcut(op(f"{name}_backward", suffix)))
        formula = _over_flat_tensors(op(name, suffix), setup_context, gradient)
        LIBRARY.impl(f"{name}{suffix}", formula, "Autograd")
        torch.library.register_autograd(
            f"kdops::{name}_backward{suffix}", backward_twice, setup_context=setup_twice, lib=LIBRARY
        )


def batched(t: Tensor) -> bool:
    """Whether a gradient is a batch of them (`is_grads_batched`), which torch hands to operators one by one, but not to those of lists."""
    return torch._C._functorch.is_legacy_batchedtensor(t)


def _shortcut(overload: Op) -> Op:
    """Past the autograd of an operator where nothing is differentiated: it reads and hands on the lists of tensors once more."""

    def call(*arguments: Any) -> Any:
        _refuse_tangents(overload, arguments)
        return (overload if torch.is_grad_enabled() else run)(*arguments)

    run = _below_autograd(overload)
    return call


def _over_flat_tensors(overload: Op, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Op:
    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
            out = run(*arguments)
            setup_context(ctx, arguments, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return None, *backward(ctx, *grads)

    def call(*arguments: Any) -> Any:
        tensors = _differentiable(arguments)
        return Flat.apply(arguments, *tensors) if tensors else run(*arguments)  # type: ignore[no-untyped-call]

    run = _below_autograd(overload)
    return call


def _lazy(module: str, function: str) -> Op:
    def call(*args: Any) -> Any:
        kernel = getattr(importlib.import_module(module), function)
        given = (t for a in args for t in (a if isinstance(a, list) else [a]))
        device = next(t.device for t in given if isinstance(t, Tensor))  # an upstream gradient may be None
        if device.type == "cuda":
            with torch.cuda.device(device):
                return kernel(*args)
        return kernel(*args)

    return call


def _in_given_dtypes(implementation: Op) -> Op:
    """Autocast reaches the torch operators within an implementation in Python: the public function has chosen the dtype before."""

    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return implementation(*args)
        with torch.autocast("cpu", enabled=False):
            return implementation(*args)

    return call
