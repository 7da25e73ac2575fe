"""What one training step costs: live bytes, milliseconds and work, by network and by loss term.

The counts (live_bytes.py) work on real tensors and on fake ones (shapes without data), which need neither memory nor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trainers.live_bytes import NOBODY, LiveBytes, Meter, Reading
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
    work: float = 0.0
    """What the seconds grow with: FLOPs and bytes moved, see live_bytes.operator_work."""

    @property
    def peak(self) -> int:
        """Most bytes at once that are this part's."""
        return max(self.forward_peak, self.held + self.backward_peak)

    def then(self, forward: Reading) -> Cost:
        """With a forward pass more."""
        return replace(
            self,
            forward_peak=max(self.forward_peak, self.held + forward.peak),
            held=self.held + forward.held,
            seconds=self.seconds + forward.seconds,
            work=self.work + forward.work,
        )

    def back(self, backward: Reading) -> Cost:
        """With its backward pass."""
        seconds, work = self.seconds + backward.seconds, self.work + backward.work
        return replace(self, backward_peak=backward.peak, seconds=seconds, work=work)


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
    small: int = 0
    """Most bytes alive at once in storages that the process keeps when they die, so that holes come between them: memory.KEPT."""

    def parts(self) -> dict[str, Cost]:
        """Name -> cost of every network and loss term, in the order of a step."""
        teachers = {name if name == "teacher" else f"teacher {name}": cost for name, cost in self.teachers.items()}
        return {"student": self.student, **teachers, **{f"loss {name}": cost for name, cost in self.terms.items()}}

    def map(self, change: Callable[[str, Cost], Cost], **others: Any) -> StepCosts:
        """The same with other costs of its parts, which `change` is given by the names that they have in parts(), and other fields."""
        parts = iter([change(name, cost) for name, cost in self.parts().items()])
        student = next(parts)
        teachers = dict(zip(self.teachers, parts, strict=False))
        terms = dict(zip(self.terms, parts, strict=True))
        return replace(self, student=student, teachers=teachers, terms=terms, **others)

    @property
    def parts_seconds(self) -> float:
        """Of all parts together: without what is between them."""
        return sum(cost.seconds for cost in self.parts().values())

    @property
    def work(self) -> float:
        """Of all parts together."""
        return sum(cost.work for cost in self.parts().values())

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
        seconds, peak, small = time.perf_counter() - started, live.peak, live.small_peak
        del losses
    student, teachers, terms = _parts(train_step, batch, parameters)
    if train_step.method.requirements().batch_coupled:  # then they run before, for the whole effective batch
        teachers = {name: network_cost(teacher, batch.lq) for name, teacher in train_step.teachers.items()}
    trained = sum(p.numel() * p.element_size() for p in parameters)
    return StepCosts(student, teachers, terms, peak, _weights(train_step), trained, seconds, small)


@torch.no_grad()
def network_cost(network: Network, x: Tensor) -> Cost:
    """Of a frozen network's forward pass."""
    with LiveBytes() as live:
        meter = Meter(live)
        results = network(x)
        cost = Cost().then(meter.read())
    del results
    return cost


def _weights(train_step: TrainStep) -> int:
    modules: list[nn.Module] = [train_step, *train_step.frozen_modules()]
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    return total


class _Cut:
    """Runs a network, measures it, and hands its output and taps on as leaves of a new graph."""

    def __init__(self, network: Network, calls: _Calls, trained: bool) -> None:
        self.network, self.calls, self.trained = network, calls, trained
        self.results: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.cost = Cost()

    def __call__(self, x: Tensor) -> tuple[Tensor, Features]:
        with self.calls.nested():
            meter = Meter(self.calls.live)
            output, taps = self.network(x)
            self.cost = self.cost.then(meter.read())
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
        calls = _Calls(live)
        student = _Cut(train_step._adapted_student, calls, trained=True)
        teachers = {name: _Cut(teacher, calls, trained=False) for name, teacher in train_step.teachers.items()}
        with calls:
            losses = train_step.method(batch, student, teachers)
        terms = calls.by_term(losses)
        leaves = [leaf for leaf in student.leaves if leaf.requires_grad]
        others = [p for p in train_step.method.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        graphs = {name: set(_graph(loss)) for name, loss in losses.items()}
        for name in list(losses):
            loss, own = losses.pop(name), graphs.pop(name)
            # What a term holds is freed on the way back, as in training, unless a later term needs it too.
            shared = any(own & later for later in graphs.values())
            meter = Meter(live)
            if loss.requires_grad:
                torch.autograd.grad(loss, [*leaves, *others], retain_graph=shared, allow_unused=True)
            terms[name] = terms[name].back(meter.read())
        meter = Meter(live)
        roots = [result for result in student.results if result.requires_grad]
        torch.autograd.grad(roots, parameters, gradients, allow_unused=True)
        whole = student.cost.back(meter.read())
    return whole, {name: cut.cost for name, cut in teachers.items()}, terms


def _graph(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph behind a loss, each once; those of leaves keep nothing and are left out."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        yield node


@dataclass(frozen=True)
class _Call:
    """A call of torch or kdops outside of the networks."""

    reading: Reading
    before: Mapping[int, int]
    """Call -> bytes of it that were alive when this one began."""


class _Calls(TorchFunctionMode):
    """Records what every call of torch and kdops outside of the networks takes, and the nodes of the graph that it made."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live
        self.calls: list[_Call] = []
        self.made: dict[Any, int] = {}  # node -> index of the call
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self.nested() as outermost:
            if not outermost:
                return func(*args, **(kwargs or {}))
            self.live.owner, before, meter = len(self.calls), dict(self.live.owned), Meter(self.live)
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    self.made.setdefault(tensor.grad_fn, self.live.owner)
            self.calls.append(_Call(meter.read(), before))
            self.live.owner = NOBODY
        return out

    @contextmanager
    def nested(self) -> Iterator[bool]:
        """Calls within are none of their own; whether this is the outermost."""
        self.depth += 1
        try:
            yield self.depth == 1
        finally:
            self.depth -= 1

    def by_term(self, losses: Mapping[str, Tensor]) -> dict[str, Cost]:
        """The forward pass of each loss: the calls that it needed, together."""
        terms, found = self._terms(losses), {}
        for name in losses:
            own = [index for index, term in enumerate(terms) if term == name]
            calls = [self.calls[index] for index in own]
            peaks = [sum(call.before.get(index, 0) for index in own) + call.reading.peak for call in calls]
            held = sum(self.live.owned[index] for index in own)
            seconds, work = sum(call.reading.seconds for call in calls), sum(call.reading.work for call in calls)
            found[name] = Cost(max(peaks, default=0), held, seconds=seconds, work=work)
        return found

    def _terms(self, losses: Mapping[str, Tensor]) -> list[str]:
        """The loss that each call is counted for: the first that needs it; where it has no gradient, that of the call after it."""
        needed: dict[int, str] = {}
        for name, loss in losses.items():
            for node in _graph(loss):
                if node in self.made:
                    needed.setdefault(self.made[node], name)
        found, term = [], list(losses)[-1]
        for index in reversed(range(len(self.calls))):
            term = needed.get(index, term)
            found.append(term)
        return found[::-1]
