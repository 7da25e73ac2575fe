"""What one training step costs: live bytes and milliseconds, by network and by loss term.

The bytes are counted below autograd, where every operator passes: storages that are alive, and the scratch memory that kdops operators
state themselves. So the same count works on real tensors and on fake ones (shapes without data), which need no memory at all.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdops.dispatch import SPECS
from trainers.methods.base import Batch, Features, Network
from trainers.step import TrainStep


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of a part of the step."""

    forward_peak: int = 0
    """Most bytes alive at once in its forward pass, above what was alive before it."""
    held: int = 0
    """Bytes that stay alive for its backward pass."""
    backward_peak: int = 0
    """Most bytes alive at once in its backward pass, above what was alive before it."""
    seconds: float = 0.0
    """Forward and backward; without meaning on fake tensors."""

    @property
    def peak(self) -> int:
        """Most bytes at once that are this part's."""
        return max(self.forward_peak, self.held + self.backward_peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made beneath it that are still alive, and their peak, with the scratch of kdops operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor, given)
        self.peak = max(self.peak, self.current + scratch_bytes(func, args))
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
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What a raw kdops operator allocates within one call, as its spec says; 0 for the operators of others."""
    if func.namespace != "kdops":
        return 0
    raw = func._schema.name.split("::")[1].removesuffix("_triton")
    name = raw.removesuffix("_backward")
    spec = SPECS.get(name)
    if spec is None:
        return 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    parameters = inspect.signature(spec.function).parameters.values()
    tensors, options, last = [], {}, None
    for parameter in parameters:
        value = given.get(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            if value is not None:
                options[parameter.name] = value
        else:
            last = value if value is not None else last  # None: the same tensor as the argument before
            needed = bool(given.get(f"need_{parameter.name}", False))
            tensors.append(last.detach().requires_grad_(needed) if isinstance(last, Tensor) else last)
    return spec.scratch_bytes(*tensors, **options, backward=raw != name)


# --- one step ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCosts:
    """The parts of one training step on one micro-batch."""

    student: Cost
    teachers: dict[str, Cost]
    terms: dict[str, Cost]
    peak: int
    """Most bytes alive at once in the whole step, above weights and inputs; with the gradients, without the optimiser's state."""
    weights: int
    """Bytes of all weights: student, adapters, teachers, the method's own."""
    trained: int
    """Bytes of the trained weights."""
    seconds: float
    """Of the whole step."""

    def parts(self) -> dict[str, Cost]:
        """Name -> cost of every network and loss term, in the order of a step."""
        teachers = {name if name == "teacher" else f"teacher {name}": cost for name, cost in self.teachers.items()}
        return {"student": self.student, **teachers, **{f"loss {name}": cost for name, cost in self.terms.items()}}

    def largest(self) -> str:
        """What takes most: "most is taken by loss spatial, 33.0 GiB"."""
        name, cost = max(self.parts().items(), key=lambda part: part[1].peak)
        return f"most is taken by {name}, {cost.peak / 2**30:.1f} GiB"

    @property
    def optimizer(self) -> int:
        """Adam's two moments of every trained weight."""
        return 2 * self.trained


def step_costs(train_step: TrainStep, batch: Batch) -> StepCosts:
    """Costs of one forward and backward pass; run it a second time for times without first-call costs.

    The terms are separated by cutting the graph at the student's output and taps: what lies behind the cut is a term's own. What two
    terms share is counted for the first.
    """
    parameters = [p for p in train_step.parameters() if p.requires_grad]
    started = time.perf_counter()
    with LiveBytes() as live:
        losses = train_step(batch)
        torch.autograd.grad(_total(losses), parameters, allow_unused=True)
        seconds, peak = time.perf_counter() - started, live.peak
        del losses
    student, teachers, terms = _parts(train_step, batch, parameters)
    if train_step.method.requirements().batch_coupled:  # then they run before, for the whole effective batch
        teachers = {name: network_cost(teacher, batch.lq) for name, teacher in train_step.teachers.items()}
    trained = sum(p.numel() * p.element_size() for p in parameters)
    return StepCosts(student, teachers, terms, peak, _weights(train_step), trained, seconds)


@torch.no_grad()
def network_cost(network: Network, x: Tensor) -> Cost:
    """Of a frozen network's forward pass."""
    with LiveBytes() as live:
        started = time.perf_counter()
        results = network(x)
        seconds = time.perf_counter() - started
        held = live.current
    del results
    return Cost(live.peak, held, seconds=seconds)


def _weights(train_step: TrainStep) -> int:
    modules: list[nn.Module] = [train_step, *train_step.frozen_modules()]
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    return total


class _Cut:
    """Runs a network, measures it, and hands its output and taps on as leaves of a new graph."""

    def __init__(self, network: Network, live: LiveBytes, trained: bool) -> None:
        self.network, self.live, self.trained = network, live, trained
        self.results: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.cost = Cost()
        self.elapsed = 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Features]:
        before, started = self.live.mark(), time.perf_counter()
        output, taps = self.network(x)
        seconds = time.perf_counter() - started
        self.elapsed += seconds
        peak, held = self.live.peak - before, self.live.current - before
        self.cost = Cost(max(self.cost.forward_peak, peak), self.cost.held + held, seconds=self.cost.seconds + seconds)
        if not self.trained:
            return output, taps
        new = {name: self._leaf(tap) for name, tap in taps.items()}
        return self._leaf(output), new

    def _leaf(self, result: Tensor) -> Tensor:
        leaf = result.detach().requires_grad_(result.requires_grad)
        self.results.append(result)
        self.leaves.append(leaf)
        return leaf


def _parts(
    train_step: TrainStep, batch: Batch, parameters: Sequence[Tensor]
) -> tuple[Cost, dict[str, Cost], dict[str, Cost]]:
    with LiveBytes() as live:
        student = _Cut(train_step._adapted_student, live, trained=True)
        teachers = {name: _Cut(teacher, live, trained=False) for name, teacher in train_step.teachers.items()}
        calls = _Calls(live, [student, *teachers.values()])
        with calls:
            losses = train_step.method(batch, student, teachers)
        forward = calls.by_term(losses)
        leaves = [leaf for leaf in student.leaves if leaf.requires_grad]
        others = [p for p in train_step.method.parameters() if p.requires_grad]
        terms, gradients = {}, [torch.zeros_like(leaf) for leaf in leaves]
        for name, loss in losses.items():
            before, started = live.mark(), time.perf_counter()
            if loss.requires_grad:
                torch.autograd.grad(loss, [*leaves, *others], retain_graph=True, allow_unused=True)
            seconds = time.perf_counter() - started + forward[name].seconds
            peak = live.peak - before
            terms[name] = Cost(forward[name].forward_peak, forward[name].held, peak, seconds)
        del losses
        before, started = live.mark(), time.perf_counter()
        roots = [result for result in student.results if result.requires_grad]
        torch.autograd.grad(roots, parameters, gradients, allow_unused=True)
        spent = student.cost.seconds + time.perf_counter() - started
        whole = Cost(student.cost.forward_peak, student.cost.held, live.peak - before, spent)
    return whole, {name: cut.cost for name, cut in teachers.items()}, terms


class _Calls(TorchFunctionMode):
    """Records what every call of torch and kdops costs, beside the node of the graph that it made."""

    def __init__(self, live: LiveBytes, networks: Iterable[_Cut]) -> None:
        super().__init__()
        self.live = live
        self.networks = list(networks)
        self.costs: dict[Any, Cost] = {}
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self._nested() as outermost:
            before, started = self.live.mark() if outermost else 0, time.perf_counter()
            out = func(*args, **(kwargs or {}))
            if outermost:
                cost = Cost(self.live.peak - before, self.live.current - before, seconds=time.perf_counter() - started)
                for tensor in tree_leaves(out):
                    if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                        self.costs[tensor.grad_fn] = cost
        return out

    @contextmanager
    def _nested(self) -> Iterator[bool]:
        self.depth += 1
        try:
            yield self.depth == 1
        finally:
            self.depth -= 1

    def by_term(self, losses: Mapping[str, Tensor]) -> dict[str, Cost]:
        """The calls that each loss needed, added up: peaks are the largest, bytes that are held and seconds are sums."""
        found, counted = {}, set()
        for name, loss in losses.items():
            peak, held, seconds, waiting = 0, 0, 0.0, [loss.grad_fn]
            while waiting:
                node = waiting.pop()
                if node is None or node in counted:
                    continue
                counted.add(node)
                waiting += [parent for parent, _ in node.next_functions]
                cost = self.costs.get(node, Cost())
                peak, held, seconds = max(peak, held + cost.forward_peak), held + cost.held, seconds + cost.seconds
            found[name] = Cost(peak, held, seconds=seconds)
        return found
