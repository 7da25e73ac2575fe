"""The methods against their formulas written as loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.trainers.stand_ins import TAPS, B, images, network, taps
from trainers.methods import Batch, build
from trainers.methods.facd import FACDOptions, teacher_is_better
from trainers.methods.output import OutputOptions
from trainers.methods.scratch import ScratchOptions


def facd_losses(rows: slice = slice(None), imitated: Tensor | None = None, **options: object) -> dict[str, Tensor]:
    """FACD on fixed random features; by default of a teacher that is better on every patch."""
    gt = images(0)
    imitated = gt if imitated is None else imitated
    method = build(FACDOptions.model_validate({"name": "facd", **options}))
    batch = Batch(images(3)[rows], gt[rows], rows, {"teacher": (imitated, taps(2))})
    return method(batch, network(images(1), taps(1), rows), {})


def mean_absolute(u: Tensor, v: Tensor) -> Tensor:
    return (u - v).abs().mean()


def by_hand(
    term: Callable[[Tensor, list[Tensor]], Tensor], apart: Callable[[Tensor, Tensor], Tensor] = mean_absolute
) -> Tensor:
    """(B,): the mean over taps of term(d_pos, [d_neg]), negatives = the teacher's other patches."""
    student, teacher = taps(1), taps(2)
    rows = []
    for i in range(B):
        per_tap = []
        for name in TAPS:
            distance = [apart(student[name][i], teacher[name][k]) for k in range(B)]
            per_tap.append(term(distance[i], [distance[k] for k in range(B) if k != i]))
        rows.append(torch.stack(per_tap).mean())
    return torch.stack(rows)


def test_facd_ratio_is_its_formula() -> None:
    expected = by_hand(lambda positive, negatives: positive / (torch.stack(negatives).mean() + 1e-7))
    losses = facd_losses()
    torch.testing.assert_close(losses["contrast"], expected.mean())
    torch.testing.assert_close(losses["pixel"], (images(1) - images(0)).abs().mean())
    torch.testing.assert_close(losses["output"], losses["pixel"])  # this teacher is perfect


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_facd_infonce_is_its_formula(temperature: float) -> None:
    def term(positive: Tensor, negatives: list[Tensor]) -> Tensor:
        similar = (-positive / temperature).exp()
        return -(similar / (similar + sum((-d / temperature).exp() for d in negatives))).log()

    losses = facd_losses(form="infonce", temperature=temperature)
    torch.testing.assert_close(losses["contrast"], by_hand(term).mean())


def test_facd_squared_distance() -> None:
    student, teacher = taps(1)["t1"], taps(2)["t1"]
    method = build(FACDOptions(name="facd", distance="l2"))
    others = ~torch.eye(B, dtype=torch.bool)
    found = method.contrast(student, teacher, teacher, others)
    squared = (student[:, None] - teacher[None]).square().mean(dim=(2, 3, 4))
    expected = squared.diagonal() / (squared.where(others, 0).sum(dim=1) / (B - 1) + 1e-7)
    torch.testing.assert_close(found, expected)


def test_facd_cosine_distance() -> None:
    def term(positive: Tensor, negatives: list[Tensor]) -> Tensor:
        return positive / (torch.stack(negatives).mean() + 1e-7)

    def apart(u: Tensor, v: Tensor) -> Tensor:
        return 1 - (u * v).sum() / (u.norm() * v.norm())

    torch.testing.assert_close(facd_losses(distance="cosine")["contrast"], by_hand(term, apart).mean())


def test_facd_cosine_distance_beside_a_temperature() -> None:
    """Where the size of a distance counts: 1 - cos itself."""

    def term(positive: Tensor, negatives: list[Tensor]) -> Tensor:
        return positive / 0.5 + torch.stack([-positive / 0.5, *(-d / 0.5 for d in negatives)]).logsumexp(dim=0)

    def apart(u: Tensor, v: Tensor) -> Tensor:
        return 1 - (u * v).sum() / (u.norm() * v.norm())

    losses = facd_losses(form="infonce", distance="cosine", temperature=0.5)
    torch.testing.assert_close(losses["contrast"], by_hand(term, apart).mean())


@pytest.mark.parametrize("negatives", [3, 4, 9])
def test_facd_takes_all_others_where_no_more_are_there(negatives: int) -> None:
    batch = Batch(images(3), images(0), key=(1, 5))
    found = build(FACDOptions(name="facd", negatives=negatives)).others(batch, B)
    assert torch.equal(found, ~torch.eye(B, dtype=torch.bool))


def test_facd_draws_negatives_that_do_not_depend_on_the_split() -> None:
    method = build(FACDOptions(name="facd", negatives=2))
    whole = method.others(Batch(images(3), images(0), slice(0, 4), key=(1, 5)), 8)
    assert whole.sum(dim=1).tolist() == [2] * 4
    assert not whole[:, :4].diagonal().any()
    half = method.others(Batch(images(3)[2:], images(0)[2:], slice(2, 4), key=(1, 5)), 8)
    assert torch.equal(half, whole[2:])
    other_step = method.others(Batch(images(3), images(0), slice(0, 4), key=(1, 6)), 8)
    assert not torch.equal(other_step, whole)


def test_facd_adapts_to_a_weak_teacher() -> None:
    """Half of the patches have a teacher that is worse than the student: they do not count."""
    imitated = images(0)
    imitated[::2] += 10.0
    every = by_hand(lambda positive, negatives: positive / (torch.stack(negatives).mean() + 1e-7))
    adaptive, always = facd_losses(imitated=imitated), facd_losses(imitated=imitated, adaptive=False)
    torch.testing.assert_close(adaptive["contrast"], every[1::2].sum() / B)
    torch.testing.assert_close(always["contrast"], every.mean())
    assert teacher_is_better(images(1), imitated, images(0)).tolist() == [0, 1, 0, 1]
    assert not teacher_is_better(images(1), images(1), images(0)).any()


@pytest.mark.parametrize("form", ["ratio", "infonce"])
def test_facd_of_micro_batches_is_that_of_the_batch(form: str) -> None:
    whole = facd_losses(form=form)
    halves = [facd_losses(slice(start, start + 2), form=form) for start in (0, 2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (halves[0][name] + halves[1][name]) / 2)


def test_facd_of_a_perfect_student() -> None:
    gt = images(0)
    batch = Batch(images(3), gt, slice(None), {"teacher": (gt, taps(2))})
    losses = build(FACDOptions(name="facd"))(batch, network(images(1), taps(2)), {})
    assert losses["contrast"] == 0


def test_facd_gradient_goes_to_the_student_alone() -> None:
    student = {name: feature.requires_grad_() for name, feature in taps(1).items()}
    teacher = taps(2)
    batch = Batch(images(3), images(0), slice(None), {"teacher": (images(0), teacher)})
    build(FACDOptions(name="facd"))(batch, network(images(1), student), {})["contrast"].backward()
    assert all(feature.grad is not None and feature.grad.abs().sum() > 0 for feature in student.values())


def test_output_and_scratch() -> None:
    batch = Batch(images(3), images(0))
    student, teacher = network(images(1), {}), network(images(2), {})
    losses = build(OutputOptions(name="output"))(batch, student, {"teacher": teacher})
    torch.testing.assert_close(losses["pixel"], (images(1) - images(0)).abs().mean())
    torch.testing.assert_close(losses["output"], (images(1) - images(2)).abs().mean())
    assert build(ScratchOptions(name="scratch"))(batch, student, {}) == {"pixel": losses["pixel"]}
