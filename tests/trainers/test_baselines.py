"""The baselines against their formulas written out, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.trainers.stand_ins import KEY, TAPS, B, images, losses_of, make, network, taps
from trainers.data.resize import imresize
from trainers.methods import Batch, Run
from trainers.methods.at import attention_map
from trainers.methods.augmentation import OPERATIONS, Augmentation
from trainers.methods.csd import CSDOptions
from trainers.methods.dukd import DUKDOptions
from trainers.methods.image_contrast import level_weights


def per_tap(term: object, student_seed: int = 1, teacher_seed: int = 2, channels: int = 5) -> Tensor:
    student, teacher = taps(student_seed), taps(teacher_seed, channels)
    return torch.stack([term(student[name], teacher[name]) for name in TAPS]).mean()  # type: ignore[operator]


def feature_losses(name: str, channels: int = 5, **options: object) -> dict[str, Tensor]:
    """The losses of a method of taps, on fixed random images and features."""
    batch = Batch(images(3), images(0))
    teachers = {"teacher": network(images(2), taps(2, channels))}
    return losses_of(make(name, **options), batch, network(images(1), taps(1)), teachers)


@pytest.mark.parametrize("name", ["fitnet", "at", "fakd", "rkd"])
def test_image_losses(name: str) -> None:
    losses = feature_losses(name)
    torch.testing.assert_close(losses["pixel"], (images(1) - images(0)).abs().mean())
    torch.testing.assert_close(losses["output"], (images(1) - images(2)).abs().mean())


def test_fitnet() -> None:
    expected = per_tap(lambda s, t: (s - t).abs().mean())
    torch.testing.assert_close(feature_losses("fitnet")["feature"], expected)


def test_fitnet_of_channel_means_takes_any_widths() -> None:
    expected = per_tap(lambda s, t: (s.mean(dim=1) - t.mean(dim=1)).abs().mean(), channels=7)
    torch.testing.assert_close(feature_losses("fitnet", 7, features="channel_mean")["feature"], expected)
    assert not make("fitnet", features="channel_mean").requirements().adapters


def test_at() -> None:
    def attention(feature: Tensor) -> Tensor:
        energy = (feature**2).sum(dim=1)  # (B, h, w)
        return energy / ((energy**2).sum(dim=(1, 2), keepdim=True).sqrt() + 1e-6)

    expected = per_tap(lambda s, t: (attention(s) - attention(t)).abs().mean(), channels=7)
    torch.testing.assert_close(feature_losses("at", 7)["attention"], expected)


@pytest.mark.parametrize("p", [1, 2])
def test_fakd(p: int) -> None:
    def affinity(feature: Tensor) -> Tensor:
        flat = feature.flatten(2)
        unit = flat / ((flat**2).sum(dim=1, keepdim=True).sqrt() + 1e-8)
        return unit.transpose(1, 2) @ unit  # (B, N, N)

    expected = per_tap(lambda s, t: ((affinity(s) - affinity(t)).abs() ** p).mean(), channels=7)
    torch.testing.assert_close(feature_losses("fakd", 7, p=p)["affinity"], expected)


@pytest.mark.parametrize("vectors", ["pooled", "flat"])
def test_rkd(vectors: str) -> None:
    def vector(tap: Tensor) -> Tensor:
        return tap.mean(dim=(2, 3)) if vectors == "pooled" else tap.flatten(1)

    def huber(x: Tensor, y: Tensor) -> Tensor:
        apart = (x - y).abs()
        return torch.where(apart < 1, 0.5 * apart**2, apart - 0.5)

    def distances(tap: Tensor) -> Tensor:
        x = vector(tap)
        found = torch.stack([torch.stack([(x[i] - x[j]).norm() for j in range(B)]) for i in range(B)])
        return found / found[found > 0].mean()

    def angles(tap: Tensor) -> Tensor:
        x, found = vector(tap), torch.zeros(B, B, B, dtype=torch.float64)
        for i, j, k in itertools.product(range(B), repeat=3):
            if i != j != k:
                one, two = x[i] - x[j], x[k] - x[j]
                found[i, j, k] = (one @ two) / (one.norm() * two.norm())
        return found

    losses = feature_losses("rkd", vectors=vectors)
    torch.testing.assert_close(losses["distance"], per_tap(lambda s, t: huber(distances(s), distances(t)).mean()))
    torch.testing.assert_close(losses["angle"], per_tap(lambda s, t: huber(angles(s), angles(t)).mean()))


def test_rkd_of_equal_samples_has_finite_gradients() -> None:
    tap = torch.ones(B, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    batch = Batch(images(3), images(0))
    student = network(images(1), dict.fromkeys(TAPS, tap))
    losses = losses_of(make("rkd"), batch, student, {"teacher": network(images(2), taps(2))})
    (losses["distance"] + losses["angle"]).backward()
    assert tap.grad is not None
    assert tap.grad.isfinite().all()
    assert all(losses[name].isfinite() for name in ("distance", "angle"))


def test_at_of_a_dead_tap_is_zero() -> None:
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 5)), torch.zeros(2, 20))


def test_rkd_cannot_be_split() -> None:
    assert make("rkd").requirements().batch_coupled is False
    assert "student's features" in str(feature_options("rkd").indivisible)


def feature_options(name: str) -> object:
    from trainers.methods import METHODS

    return METHODS[name][0].model_validate({"name": name})


@pytest.mark.parametrize("name", ["fitnet", "at", "fakd", "rkd"])
def test_a_perfect_student_has_no_loss(name: str) -> None:
    batch = Batch(images(3), images(0))
    same = network(images(0), taps(2))
    for loss in losses_of(make(name), batch, same, {"teacher": same}).values():
        assert loss.abs() < 1e-12


@pytest.mark.parametrize("name", ["fitnet", "at", "fakd", "rkd"])
def test_gradients_reach_every_tap_of_the_student_and_none_of_the_teacher(name: str) -> None:
    """DUKD's version of FAKD detaches its feature term; here every feature term trains."""
    method = make(name)
    features = [loss for loss in method.losses if loss not in ("pixel", "output")]
    for loss in features:
        student = {tap: feature.requires_grad_() for tap, feature in taps(1).items()}
        teacher = {tap: feature.requires_grad_() for tap, feature in taps(2).items()}
        frozen = torch.no_grad()(network(images(2), teacher))
        losses = losses_of(method, Batch(images(3), images(0)), network(images(1), student), {"teacher": frozen})
        losses[loss].backward()
        assert all(feature.grad is not None and feature.grad.abs().sum() > 0 for feature in student.values()), loss


SIDE = 16


def csd_losses(rows: slice = slice(None), **options: object) -> dict[str, Tensor]:
    """CSD in super-resolution: inputs of half the size."""
    method = make("csd", **options)
    whole = Batch(images(3, SIDE // 2), images(0, SIDE))
    teachers = {"teacher": network(images(2, SIDE), {}, rows)}
    shared = method.share(whole, teachers)
    batch = Batch(whole.lq[rows], whole.gt[rows], rows, shared)
    return method(batch, network(images(1, SIDE), {}, rows), teachers)


@pytest.mark.parametrize("count", [2, 10])
def test_csd(count: int) -> None:
    method = make("csd", negatives=count, eps=0.01)
    anchor, positive = method.features(images(1, SIDE)).levels, method.features(images(2, SIDE)).levels
    negative = method.features(imresize(images(3, SIDE // 2), 2)).levels
    expected = torch.zeros(B, dtype=torch.float64)
    for weight, a, p, n in zip([1 / 16, 1 / 8, 1 / 4, 1], anchor, positive, negative, strict=True):
        for i in range(B):
            away = torch.stack([(a[i] - n[k]).abs().mean() for k in range(min(count, B))]).mean()
            expected[i] += weight * (a[i] - p[i]).abs().mean() / (away + 0.01 * p[i].abs().mean())
    losses = csd_losses(negatives=count, eps=0.01)
    torch.testing.assert_close(losses["contrast"], expected.mean())


def test_csd_of_micro_batches_is_that_of_the_batch() -> None:
    whole, halves = csd_losses(), [csd_losses(slice(start, start + 2)) for start in (0, 2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (halves[0][name] + halves[1][name]) / 2)


def test_level_weights_are_those_of_five_levels() -> None:
    assert level_weights(5) == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
    assert level_weights(1) == [1]


def test_csd_needs_patches_that_its_network_takes() -> None:
    options = CSDOptions(name="csd")
    assert options.refusals(Run(scale=2, patch=48)) == []
    assert "multiple of 8" in options.refusals(Run(scale=2, patch=44))[0][1]


def twice(x: Tensor) -> Tensor:
    """A network of scale 2 that keeps track of its input."""
    return interpolate(x, scale_factor=2) * 0.9


def test_dukd() -> None:
    method, lq, gt = make("dukd", augment=0.5), images(3, 8), images(0, 16)
    batch = Batch(lq, gt, key=KEY)
    seen: list[Tensor] = []

    def student(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(x)
        return twice(x), {}

    losses = losses_of(method, batch, student, {"teacher": lambda x: (twice(x) + 0.01 * x.mean(), {})})
    generators = batch.generators("dukd")
    crops = []
    for image, generator in zip(gt, generators, strict=True):
        top, left = (int(torch.randint(9, (), generator=generator)) for _ in range(2))
        crops.append(image[:, top : top + 8, left : left + 8])
    crop, smaller = torch.stack(crops), imresize(lq, 0.5)
    teacher = 0.01
    torch.testing.assert_close(losses["pixel"], (twice(lq) - gt).abs().mean())
    torch.testing.assert_close(losses["zoom_out_label"], (twice(smaller) - lq).abs().mean())
    torch.testing.assert_close(losses["zoom_out"], (teacher * smaller.mean()).abs())
    assert {tuple(x.shape) for x in seen} == {(B, 3, 8, 8), (B, 3, 4, 4)}
    flips = Augmentation(generators, 0.5, crop.device)  # the generators go on where the crops left them
    torch.testing.assert_close(seen[1], flips(crop))
    expected = (flips.undo(twice(flips(crop))) - (twice(crop) + teacher * crop.mean())).abs().mean()
    torch.testing.assert_close(losses["zoom_in"], expected)


def test_dukd_does_not_depend_on_the_split() -> None:
    method, lq, gt = make("dukd"), images(3, 8), images(0, 16)

    def losses(rows: slice) -> dict[str, Tensor]:
        batch = Batch(lq[rows], gt[rows], rows, key=KEY)
        return method(batch, lambda x: (twice(x), {}), {"teacher": lambda x: (twice(x) ** 2, {})})

    whole, halves = losses(slice(0, 4)), [losses(slice(start, start + 2)) for start in (0, 2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (halves[0][name] + halves[1][name]) / 2)


def test_dukd_is_for_super_resolution() -> None:
    options = DUKDOptions(name="dukd")
    assert "keeps the size" in options.refusals(Run(scale=1, patch=48))[0][1]
    assert "multiple of 9" in options.refusals(Run(scale=3, patch=48))[0][1]
    assert options.refusals(Run(scale=2, patch=48)) == []


@pytest.mark.parametrize("side", [6, 7])
def test_augmentations_are_undone(side: int) -> None:
    """All sixteen combinations, the order of undoing included: a transposition and a single flip do not commute."""
    x = images(1, side)
    for chosen in itertools.product([False, True], repeat=len(OPERATIONS)):
        augmentation = Augmentation([torch.Generator().manual_seed(i) for i in range(B)], 0.5, x.device)
        augmentation.chosen = torch.tensor(chosen)[:, None, None, None, None].expand(-1, B, 1, 1, 1)
        there = augmentation(x)
        assert any(chosen) != torch.equal(there, x)
        torch.testing.assert_close(augmentation.undo(there), x)
