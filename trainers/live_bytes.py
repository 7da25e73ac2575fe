"""Counts what operators do: bytes alive, FLOPs and bytes moved, on real tensors and on fake ones.

Everything is counted below autograd, where every operator passes: storages that are alive, and what kdops operators state of themselves,
the scratch memory and the FLOPs within one call.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kdops.dispatch import SPECS, OpSpec, size
from trainers.memory import KEPT

BALANCE = 10  # FLOPs that a machine does while it moves one byte: CPUs and GPUs have 5 to 30
NOBODY = -1


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made beneath it that are alive, their peak with the scratch of kdops operators, and the work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.work = 0.0
        self.small = self.small_peak = 0  # of storages that the process keeps alone
        self.owner = NOBODY
        self.owned: Counter[int] = Counter()  # owner -> bytes alive that were made while it was set
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor, given)
        self.peak = max(self.peak, self.current + scratch_bytes(func, args))
        self.work += operator_work(func, args, kwargs or {}, out)
        return out

    def mark(self) -> int:
        """The bytes alive now; the peak starts again from here."""
        self.peak = self.current
        return self.current

    def _track(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:  # a view, or an operator in place, of what was there before
            return
        size = storage.nbytes()
        self._known.add(key)
        self.current += size
        self.owned[self.owner] += size
        self.small += size * (size < KEPT)
        self.small_peak = max(self.small_peak, self.small)
        weakref.finalize(storage, self._freed, key, size, self.owner)

    def _freed(self, key: int, size: int, owner: int) -> None:
        self._known.discard(key)
        self.current -= size
        self.owned[owner] -= size
        self.small -= size * (size < KEPT)


@dataclass(frozen=True)
class Reading:
    """What happened between two moments: peak and change of the bytes alive, above those at the first, seconds and work."""

    peak: int
    held: int
    seconds: float
    work: float


class Meter:
    """Reads what has happened since it was made; one within another leaves the other's reading right."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.outer = live, live.peak
        self.before, self.work, self.started = live.mark(), live.work, time.perf_counter()

    def read(self) -> Reading:
        live, seconds, peak = self.live, time.perf_counter() - self.started, self.live.peak
        live.peak = max(peak, self.outer)
        return Reading(peak - self.before, live.current - self.before, seconds, live.work - self.work)


def scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What a raw kdops operator allocates within one call, as its spec says; 0 for the operators of others."""
    call = _public_call(func, args)
    return call.spec.scratch_bytes(*call.tensors, **call.options, backward=call.backward) if call else 0


def operator_work(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """FLOPs of one call of an operator, and BALANCE for each byte of its tensors; 0 for views and questions about a tensor."""
    if func.is_view or func.namespace == "prim":
        return 0.0
    call, formula = _public_call(func, args), flop_registry.get(func.overloadpacket)
    if call:
        flops = call.spec.flops(*call.tensors, **call.options, backward=call.backward)
        flops -= call.spec.flops(*call.tensors, **call.options) if call.backward else 0  # forward has been counted
    else:
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
    return flops + BALANCE * size(*(t for t in tree_leaves((args, dict(kwargs), out)) if isinstance(t, Tensor)))


@dataclass(frozen=True)
class _PublicCall:
    """A call of a raw kdops operator, as the functions of its spec take it."""

    spec: OpSpec
    tensors: list[Any]
    options: dict[str, Any]
    backward: bool


def _public_call(func: Any, args: tuple[Any, ...]) -> _PublicCall | None:
    """None for the operators of others."""
    if func.namespace != "kdops":
        return None
    raw = func._schema.name.split("::")[1].removesuffix("_triton")
    name = raw.removesuffix("_backward")
    spec = SPECS.get(name)
    if spec is None:
        return None
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    tensors, options, last = [], {}, None
    for parameter in inspect.signature(spec.function).parameters.values():
        value = given.get(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            if value is not None:
                options[parameter.name] = value
        else:
            last = value if value is not None else last  # None: the same tensor as the argument before
            needed = bool(given.get(f"need_{parameter.name}", False))
            tensors.append(last.detach().requires_grad_(needed) if isinstance(last, Tensor) else last)
    return _PublicCall(spec, tensors, options, backward=raw != name)
