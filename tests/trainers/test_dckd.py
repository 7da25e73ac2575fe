"""DCKD against its formulas written out, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tests.trainers.stand_ins import KEY, B, images, losses_of, make, network
from trainers.methods import Batch, Run
from trainers.methods.augmentation import Augmentation
from trainers.methods.dckd import DCKD, DCKDOptions
from trainers.methods.negatives import Negatives, degrade

SIDE = 16


def dckd(**options: object) -> DCKD:
    method = make("dckd", **options)
    assert isinstance(method, DCKD)
    torch.manual_seed(0)
    method.prepare(nn.Conv2d(3, 3, 3, padding=1).double())
    return method


def losses(method: DCKD, output: Tensor | None = None, rows: slice = slice(0, B)) -> dict[str, Tensor]:
    batch = Batch(images(3, SIDE)[rows], images(0, SIDE)[rows], rows, key=KEY)
    restored = images(1, SIDE) if output is None else output
    return losses_of(method, batch, network(restored, {}, rows), {"teacher": network(images(2, SIDE), {}, rows)})


def test_contrast_sums_over_the_degraded_and_the_undegraded_negatives() -> None:
    method = dckd(eps=0.01)
    lq = images(3, SIDE)
    anchor, positive = method.features(images(1, SIDE)).levels, method.features(images(2, SIDE)).levels
    expected = torch.zeros(B, dtype=torch.float64)
    generators = Batch(lq, lq, slice(0, B), key=KEY).generators("dckd negatives")
    for i, generator in enumerate(generators):
        inputs = [lq[i], *(degrade(lq[i], Negatives(), generator) for _ in range(4))]
        negatives = [method.features(method.history(x[None])).levels for x in inputs]
        for level, weight in enumerate([1 / 16, 1 / 8, 1 / 4, 1]):
            a, p = anchor[level][i], positive[level][i]
            away = sum((a - negative[level][0]).abs().mean() for negative in negatives)
            expected[i] += weight * (a - p).abs().mean() / (away + 5 * 0.01 * p.abs().mean())
    torch.testing.assert_close(losses(method)["contrast"], expected.mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_codebook_of_the_paper_and_of_the_released_code(temperature: float) -> None:
    def choice(method: DCKD, image: Tensor) -> Tensor:
        codes = method.features.codebook
        rows = method.features(image).latent.movedim(1, -1).flatten(0, 2)
        return (-(rows[:, None] - codes[None]).square().sum(dim=2) / temperature).log_softmax(dim=1)  # type: ignore[index]

    paper, released = (dckd(mapping=mapping, temperature=temperature) for mapping in ("paper", "released_code"))
    student, teacher = choice(paper, images(1, SIDE)), choice(paper, images(2, SIDE))
    torch.testing.assert_close(losses(paper)["codebook"], -(teacher.exp() * student).sum(dim=1).mean())
    twice = student.exp().log_softmax(dim=1)
    torch.testing.assert_close(losses(released)["codebook"], -(teacher.exp() * twice).sum(dim=1).mean())


def test_the_released_code_has_a_floor_far_above_0() -> None:
    """methods.md 7: for one-hot choices that agree it is log(e + K - 1) - 1, and at most log(e + K - 1)."""
    method = dckd(mapping="released_code", temperature=1e-4)
    codes = 256
    found = losses(method, images(2, SIDE))["codebook"]  # a perfect student
    assert found == pytest.approx(math.log(math.e + codes - 1) - 1, abs=1e-2)


def test_label_consistency() -> None:
    method = dckd(label_consistency=True)
    batch = Batch(images(3, SIDE), images(0, SIDE), slice(0, B), key=KEY)

    def teacher(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x.square() + x.roll(1, -1), {}

    found = losses_of(method, batch, network(images(1, SIDE), {}), {"teacher": teacher})
    augmentation = Augmentation(batch.generators("dckd label consistency"), 0.5, batch.lq.device)
    expected = augmentation.undo(teacher(augmentation(batch.lq))[0])
    torch.testing.assert_close(found["label_consistency"], (images(1, SIDE) - expected).abs().mean())
    assert "label_consistency" not in losses(dckd())


def test_a_perfect_student() -> None:
    found = losses(dckd(), images(2, SIDE))
    assert found["contrast"] == 0  # methods.md 7
    assert found["output"] == 0


def test_micro_batches_are_the_batch() -> None:
    method = dckd(label_consistency=True)
    whole, halves = losses(method), [losses(method, rows=slice(start, start + 2)) for start in (0, 2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (halves[0][name] + halves[1][name]) / 2)


def test_the_history_model_follows_the_average_on_its_schedule() -> None:
    method = dckd(history_every=[3, 4])
    average = nn.Conv2d(3, 3, 3, padding=1).double().requires_grad_(False)
    start = copy.deepcopy(method.history.state_dict())
    for step in (1, 2):
        method.after_step(step, lambda: average)
    assert all(torch.equal(value, start[key]) for key, value in method.history.state_dict().items())
    method.after_step(3, lambda: average)
    for key, value in method.history.state_dict().items():
        torch.testing.assert_close(value, 0.1 * start[key] + 0.9 * average.state_dict()[key])
    before = copy.deepcopy(method.history.state_dict())
    method.after_step(
        100_002, lambda: average
    )  # divides by 3, but the interval is 4 from here on, and stays 4 after the last phase
    assert all(torch.equal(value, before[key]) for key, value in method.history.state_dict().items())
    method.after_step(400_000, lambda: average)
    assert any(not torch.equal(value, before[key]) for key, value in method.history.state_dict().items())


def test_the_history_model_is_frozen_and_part_of_the_state() -> None:
    method = dckd().train()
    assert not method.history.training
    assert not any(parameter.requires_grad for parameter in method.parameters())
    assert set(method.state_dict()) == {"history.weight", "history.bias"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negatives": {"noise": 0.5}}, "ratio then explodes"),
        ({"features": {"name": "resnet20", "weights": __file__}}, "a network with a codebook"),
        ({"history_every": [0]}, "at least 1"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    found = DCKDOptions.model_validate({"name": "dckd"} | options).refusals(Run(scale=2, patch=48))
    assert any(said in text for _, text in found)


def test_the_defaults_are_not_refused() -> None:
    assert DCKDOptions(name="dckd").refusals(Run(scale=2, patch=48)) == []


@pytest.mark.parametrize(
    "options",
    [{"noise": 1.0}, {"noise": 1.0, "grey": 1.0}, {"blur": 1.0, "noise": 0.0}, {"resize": 1.0, "noise": 0.0}],
)
def test_degradations(options: dict[str, float]) -> None:
    image = images(1, 24)[0].float()
    made = [degrade(image, Negatives.model_validate(options), torch.Generator().manual_seed(seed)) for seed in range(8)]
    again = degrade(image, Negatives.model_validate(options), torch.Generator().manual_seed(3))
    assert torch.equal(made[3], again)
    for other in made:
        assert other.shape == image.shape
        assert not torch.equal(other, image)
        assert (other - image).square().mean().sqrt() < 0.5
    if options == {"noise": 1.0, "grey": 1.0}:
        inside = (made[0] > 0).all(dim=0) & (made[0] < 1).all(dim=0)  # where nothing was clipped
        noise = (made[0] - image)[:, inside]
        torch.testing.assert_close(noise[0], noise[2], atol=1e-6, rtol=0)
    if options.get("blur"):
        flat = degrade(torch.full((3, 8, 8), 0.25), Negatives.model_validate(options), torch.Generator().manual_seed(0))
        torch.testing.assert_close(flat, torch.full((3, 8, 8), 0.25))


def many(image: Tensor, count: int = 200, **options: float) -> list[Tensor]:
    """Copies degraded by one operation alone."""
    chosen = Negatives.model_validate({"noise": 0.0, **options})
    return [degrade(image, chosen, torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_noise_has_deviations_of_1_to_30_and_is_clipped() -> None:
    made = many(torch.full((3, 24, 24), 0.5), noise=1.0, grey=0.0)
    deviations = torch.stack([255 * (copy - 0.5).std() for copy in made])
    assert 0.9 < deviations.min() < 3
    assert 28 < deviations.max() < 33
    assert all(not torch.equal(copy[0], copy[2]) for copy in made)
    bright = many(torch.ones(3, 24, 24), 8, noise=1.0)
    assert all(copy.max() == 1 and copy.min() >= 0 for copy in bright)


def test_blur_has_deviations_of_up_to_2_along_each_axis_by_itself() -> None:
    """Of the image of a point, whose variance along an axis is the kernel's."""
    point, place = torch.zeros(3, 31, 31), torch.arange(31) - 15.0
    point[:, 15, 15] = 1
    made = many(point, blur=1.0)
    spread = torch.stack([torch.stack([copy[0].sum(dim=axis) @ place**2 for axis in (1, 0)]) for copy in made])
    torch.testing.assert_close(torch.stack([copy.sum() for copy in made]), torch.full((len(made),), 3.0))
    assert (spread.amin(dim=0) < 0.1).all()
    assert (spread.amax(dim=0) > 2.5).all()
    assert spread.max() < 4
    assert torch.corrcoef(spread.T)[0, 1].abs() < 0.3


def test_resizes_reach_from_half_to_one_and_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    def recorded(image: Tensor, size: list[int], mode: str) -> Tensor:
        sizes.append((size[0], size[1]))
        return interpolate(image, size, mode=mode)

    monkeypatch.setattr("trainers.methods.negatives.interpolate", recorded)
    many(torch.rand(3, 40, 20), resize=1.0)
    there, back = sizes[::2], sizes[1::2]
    assert set(back) == {(40, 20)}
    heights = [height for height, _ in there]
    assert all(abs(height - 2 * width) <= 1 for height, width in there)
    assert 20 <= min(heights) <= 22 < 58 <= max(heights) <= 60
    assert sum(height > 40 for height in heights) / len(heights) == pytest.approx(0.25, abs=0.1)
