"""trainers.footprint: bytes and work of one step, by network and by loss term, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from trainers.footprint import Cost, StepCosts, step_costs
from trainers.live_bytes import Reading
from trainers.methods.base import Batch, Method, Network, Requirements
from trainers.step import TrainStep
from trainers.taps import Tapped

N = 10_000  # numbers of an image, 4 bytes each
MAP = 4 * N
SCALAR = 4


class Scale(nn.Module):
    """Keeps its input for backward, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))
        self.register_buffer("unused", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


Terms = Mapping[str, Callable[[Tensor, Tensor], Tensor]]


class Losses(Method):
    """Named functions of the student's output and the teacher's."""

    def __init__(self, terms: Terms, coupled: bool = False) -> None:
        super().__init__()
        self.terms, self.coupled = terms, coupled
        self.losses = tuple(terms)

    def requirements(self) -> Requirements:
        return Requirements(batch_coupled=self.coupled)

    def forward(self, batch: Batch, student: Network, teachers: Mapping[str, Network]) -> dict[str, Tensor]:
        output = student(batch.lq)[0]
        target = batch.gt if self.coupled else teachers["big"](batch.lq)[0]
        return {name: term(output, target) for name, term in self.terms.items()}


def costs_of(terms: Terms, coupled: bool = False) -> StepCosts:
    step = TrainStep(Tapped(Scale(), {}), Losses(terms, coupled), None, {"big": Tapped(Scale(), {})})
    x = torch.rand(1, 1, 100, 100)
    return step_costs(step, Batch(x, x))


def near(size: int) -> object:
    """So many bytes, but for some single numbers."""
    return pytest.approx(size, abs=100)


def test_a_cost_is_the_most_at_any_moment() -> None:
    """Two forward passes and the way back: what the first holds lies beneath the peak of the second."""
    cost = Cost().then(Reading(50, 20, 1.0, 100.0)).then(Reading(40, 10, 2.0, 200.0))
    assert (cost.forward_peak, cost.held, cost.peak) == (60, 30, 60)
    assert cost.back(Reading(25, -30, 4.0, 400.0)) == Cost(60, 30, 25, 7.0, 700.0)
    assert cost.back(Reading(35, -30, 4.0, 400.0)).peak == 65


def test_parts_are_named_and_summed() -> None:
    student, teacher = Cost(held=2**30, seconds=1.0, work=10.0), Cost(seconds=2.0, work=20.0)
    loss = Cost(backward_peak=3 * 2**30, seconds=3.0, work=30.0)
    costs = StepCosts(student, {"teacher": teacher, "aux": teacher}, {"pixel": loss}, 0, 0, trained=100, seconds=0.0)
    assert list(costs.parts()) == ["student", "teacher", "teacher aux", "loss pixel"]
    assert (costs.parts_seconds, costs.work, costs.optimizer) == (8.0, 80.0, 200)
    assert costs.largest() == "most is taken by loss pixel, 3.0 GiB"
    doubled = costs.map(lambda name, cost: Cost(held=len(name)), peak=7)
    assert {name: cost.held for name, cost in doubled.parts().items()} == {n: len(n) for n in costs.parts()}
    assert (doubled.peak, doubled.trained) == (7, 100)


def test_each_term_holds_what_lies_behind_the_cut() -> None:
    """The square keeps its argument, the exponential its result; means and the student's output are nobody's."""
    costs = costs_of(
        {"square": lambda out, target: (out - target).square().mean(), "exp": lambda out, _: out.exp().mean()}
    )
    square, exp = costs.terms["square"], costs.terms["exp"]
    assert (square.forward_peak, square.held) == (near(2 * MAP), near(MAP))
    assert (exp.forward_peak, exp.held) == (near(MAP), near(MAP))
    assert (costs.student.forward_peak, costs.student.held) == (near(MAP), near(MAP))
    assert (costs.teachers["big"].forward_peak, costs.teachers["big"].held) == (near(MAP), near(MAP))
    assert costs.weights == 2 * 4 * (1 + 5)
    assert costs.trained == 4


def test_what_two_terms_share_is_counted_for_the_first() -> None:
    shared: list[Tensor] = []

    def first(out: Tensor, target: Tensor) -> Tensor:
        shared[:] = [(out * 3).exp()]
        return shared[0].mean()

    costs = costs_of({"first": first, "second": lambda out, target: shared.pop().square().mean()})
    assert costs.terms["first"].held == near(MAP)
    assert costs.terms["second"].held == near(0)
    assert costs.terms["second"].forward_peak == near(MAP)  # the square alone: its argument was there


def test_what_a_term_holds_is_freed_on_the_way_back() -> None:
    """As in training, unless a later term needs it: when the widest sine is gone back through, all is gone but its own argument."""
    kept: list[Tensor] = []

    def wide(out: Tensor, target: Tensor) -> Tensor:
        small = out.repeat(4, 1, 1, 1).sin().exp().mean(dim=0)
        for _ in range(4):
            small = small.sin().exp()
        kept[:] = [small.mean()]
        return kept[0]

    alone = costs_of({"wide": wide}).terms["wide"]
    kept.clear()
    shared = costs_of({"wide": wide, "twice": lambda out, target: kept.pop() * 2}).terms["wide"]
    assert shared.held == alone.held == near(13 * MAP)  # sines keep their arguments, exponentials their results
    assert shared.backward_peak - alone.backward_peak == near(9 * MAP)


def test_work_without_a_gradient_goes_with_the_call_after_it() -> None:
    def plain(out: Tensor, target: Tensor) -> Tensor:
        return out.mean()

    def weighted(out: Tensor, target: Tensor) -> Tensor:
        return (out * target.sin().cos().tan()).mean()

    costs = costs_of({"weighted": weighted, "plain": plain})
    assert costs.terms["weighted"].work > 4 * costs.terms["plain"].work


def test_teachers_of_the_whole_batch_run_before_the_step() -> None:
    costs = costs_of({"pixel": lambda out, target: (out - target).abs().mean()}, coupled=True)
    assert costs.teachers["big"].forward_peak == near(MAP)
