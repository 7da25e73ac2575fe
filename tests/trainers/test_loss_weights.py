"""Loss weights: numbers, ramps and shares of the gradient."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from trainers.fields import Fixed, Section, Share, Weight
from trainers.loss_weights import LossWeights, gradient_norms, weighted_sum
from trainers.methods import Batch, build
from trainers.methods.output import OutputOptions
from trainers.step import TrainStep
from trainers.taps import Tapped


class Terms(Section):
    pixel: Weight = 2.0
    fixed: Weight = Fixed(value=3.0, ramp=4)
    share: Weight = Share(share=0.1)


def test_numbers_and_ramps() -> None:
    weights = LossWeights(Terms())
    assert [weights.at(step)["fixed"] for step in (0, 1, 3, 100)] == [0.75, 1.5, 3.0, 3.0]
    assert [weights.at(step)["pixel"] for step in (0, 100)] == [2.0, 2.0]


def test_a_weight_that_falls_stays_where_it_ends() -> None:
    class Falling(Section):
        pixel: Weight = 1.0
        falls: Weight = Fixed(value=3.0, final=1.0, decay=4)
        both: Weight = Fixed(value=3.0, final=1.0, decay=4, ramp=2)

    found = [LossWeights(Falling()).at(step) for step in (0, 1, 3, 4, 100)]
    assert [weights["falls"] for weights in found] == [2.5, 2.0, 1.0, 1.0, 1.0]
    assert [weights["both"] for weights in found] == [1.25, 2.0, 1.0, 1.0, 1.0]


def test_a_share_is_held() -> None:
    weights = LossWeights(Terms())
    assert weights.at(0)["share"] == 0  # nothing is known of its gradient yet
    weights.update({"pixel": 0.5, "fixed": 1.0, "share": 20.0})
    assert weights.at(9)["share"] * 20.0 / (2.0 * 0.5) == pytest.approx(0.1)
    assert weights.shares(9) == pytest.approx({"fixed": 3.0 * 1.0 / (2.0 * 0.5), "share": 0.1})


def test_a_share_rises_and_is_none_of_a_pixel_term_that_is_off() -> None:
    class Off(Section):
        pixel: Weight = Fixed(value=1.0, final=0.0, decay=4)
        share: Weight = Share(share=0.1, ramp=2)

    weights = LossWeights(Off())
    weights.update({"pixel": 1.0, "share": 4.0})
    assert weights.at(0)["share"] == pytest.approx(0.1 * (1 / 2) * 0.75 / 4)
    assert weights.at(1)["share"] == pytest.approx(0.1 * 0.5 / 4)
    assert weights.at(4) == {"pixel": 0.0, "share": 0.0}
    assert weights.shares(4) == {}


def test_a_term_without_gradient_keeps_its_weight() -> None:
    weights = LossWeights(Terms())
    weights.update({"pixel": 0.5, "fixed": 1.0, "share": 20.0})
    before = weights.at(9)
    weights.update({"pixel": 0.5, "fixed": 1.0, "share": 0.0})
    weights.update({"pixel": 0.0, "fixed": 1.0, "share": 1.0})
    weights.update({"pixel": 0.5, "fixed": float("nan"), "share": float("inf")})
    assert weights.at(9) == before


def test_state_goes_round() -> None:
    weights, other = LossWeights(Terms()), LossWeights(Terms())
    weights.update({"pixel": 0.5, "fixed": 1.0, "share": 20.0})
    other.load(weights.state())
    assert other.at(5) == weights.at(5)


def test_gradient_norms_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    train_step = TrainStep(
        Tapped(student, {}), build(OutputOptions(name="output")), None, {"teacher": Tapped(teacher, {})}
    )
    lq, gt = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5)
    expected = {}
    for name, target in (("pixel", gt), ("output", teacher(lq).detach())):
        gradients = torch.autograd.grad((student(lq) - target).abs().mean(), list(student.parameters()))
        expected[name] = float(torch.cat([g.flatten() for g in gradients]).norm())
    halves = [Batch(lq[:2], gt[:2]), Batch(lq[2:], gt[2:])]
    found = gradient_norms(Fabric(accelerator="cpu", devices=1), train_step, halves)
    assert found == pytest.approx(expected, rel=1e-5)
    assert student.weight.grad is None


def test_weighted_sum() -> None:
    total = weighted_sum({"a": torch.tensor(2.0), "b": torch.tensor(5.0)}, {"a": 3.0, "b": 0.5})
    assert total == 8.5
