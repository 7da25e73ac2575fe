"""Input validation in one style of message: what was given, what is needed, what to do.

A message is put together only where it is raised: torch.compile(fullgraph=True) traces what runs, and shapes in a string break the graph.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

STATISTICS = ("mean", "sum")
REDUCTIONS = ("mean", "sum", "none")

Choice = TypeVar("Choice")


def describe(t: Tensor) -> str:
    """`(2, 3, 8, 8) float32`, for messages."""
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def tensors(op: str, **given: object) -> None:
    """TypeError unless every argument is a floating-point tensor; ValueError unless they share a device.

    dtypes must agree too (TypeError), except under autocast, where `for_distance` or `for_attention` brings them together.
    """
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}, but it must be a torch.Tensor.")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} is {describe(t)}, but it must be floating point: convert it with .float().")
    listed = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    first = next(iter(listed.values()))
    if any(t.device != first.device for t in listed.values()):
        where = ", ".join(f"{name} on {t.device}" for name, t in listed.items())
        raise ValueError(f"{op}: {where}, but they must be on one device: move them with .to(device).")
    if any(t.dtype != first.dtype for t in listed.values()) and not autocasting(first):
        said = ", ".join(f"{name} {describe(t)}" for name, t in listed.items())
        raise TypeError(
            f"{op}: {said}, but they must have one dtype: convert with .to(dtype), or run under torch.autocast."
        )


def maps(name: str, t: Tensor) -> None:
    """TypeError unless `t` is floating point, ValueError unless it has the axes (B, C, H, W)."""
    if not t.is_floating_point():
        raise TypeError(f"{name} are {describe(t)}, but they must be floating point: convert them with .float().")
    if t.ndim != 4:
        raise ValueError(f"{name} are {describe(t)}, but they must be (B, C, H, W).")


def any_tangent(given: Iterable[Tensor]) -> bool:
    """Whether forward mode is asked about any of them; outside of it nothing is looked at."""
    forward = torch.autograd.forward_ad
    return forward._current_level >= 0 and any(forward.unpack_dual(t).tangent is not None for t in given)


def autocasting(t: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `t`."""
    kind = t.device.type  # there is none for meta tensors; torch 2.11 cannot compile torch.amp.is_autocast_available
    return kind != "meta" and torch.is_autocast_enabled(kind)


def for_distance(*given: Tensor) -> tuple[Tensor, ...]:
    """Under autocast distances run in float32 (float64 stays): the same rule for every backend, the reference included."""
    if not autocasting(given[0]):
        return given
    wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    return tuple(t.to(wide) for t in given)


def for_attention(*given: Tensor) -> tuple[Tensor, ...]:
    """Under autocast attention runs in the autocast dtype (float64 stays): the same rule for every backend, the reference included."""
    if not autocasting(given[0]):
        return given
    chosen = torch.get_autocast_dtype(given[0].device.type)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else chosen
    return tuple(t.to(dtype) for t in given)


def choice(op: str, name: str, value: object, allowed: Sequence[Choice]) -> Choice:
    """The one of `allowed` that equals `value` (1 for 1.0); ValueError if none does."""
    for candidate in allowed:
        if isinstance(value, (str, numbers.Real)) and value == candidate:
            return candidate
    raise ValueError(f"{op}: {name} is {value!r}, but it must be one of {', '.join(map(repr, allowed))}.")


def number(op: str, name: str, value: object) -> float:
    """`value` as a number; TypeError for anything else, tensors above all: they would get no gradient; ValueError beyond float64."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} is a tensor, but it must be a number: no gradient flows to it. Pass {name}.item(), or, to learn it, "
            "multiply the features by it."
        )
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {value!r}, but it must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is beyond the largest number of float64, {sys.float_info.max:.1e}.") from None


def finite(op: str, name: str, value: object) -> float:
    """`value` as a number; ValueError for NaN and infinity."""
    given = number(op, name, value)
    if not -inf < given < inf:
        raise ValueError(f"{op}: {name} is {given}, but it must be finite.")
    return given


def whole(op: str, name: str, value: object) -> int:
    """`value` as an int; TypeError for anything else."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]  # which is asked here
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}, but it must be a whole number.") from None
