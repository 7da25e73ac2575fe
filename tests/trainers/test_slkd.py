"""SLKD against its formulas written out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from tests.trainers.stand_ins import B, images, losses_of, make, taps
from trainers.errors import InputError
from trainers.methods import Batch, Run
from trainers.methods.base import Network
from trainers.methods.slkd import SLKDOptions

NAMES, SIDE = ("enc1", "enc2", "latent", "dec1"), 6


def teacher_of(*, clean: bool) -> Network:
    """Its taps depend on whether it sees the clean or the degraded image."""
    return lambda x: (images(2), taps(2 if torch.equal(x, images(3)) else 4, side=SIDE, names=NAMES))


def losses(student_seed: int = 1, **options: object) -> dict[str, Tensor]:
    def student(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return images(1), taps(student_seed, side=SIDE, names=NAMES)

    teachers = {"degraded": teacher_of(clean=False), "clean": teacher_of(clean=True)}
    return losses_of(make("slkd", size=32, **options), Batch(images(3), images(0)), student, teachers)


def convert(tap: Tensor) -> Tensor:
    small = tap.mean(dim=1, keepdim=True)
    return 255 / (1 + (-interpolate(small, (32, 32), mode="bilinear", align_corners=False)).exp())


def mscn(image: Tensor, *, replicate: bool) -> Tensor:
    grid = torch.arange(7, dtype=torch.float64) - 3
    line = (-(grid**2) / (2 * (7 / 6) ** 2)).exp()
    window = torch.outer(line, line)
    window = (window / window.sum())[None, None]
    padded = torch.nn.functional.pad(image, (3, 3, 3, 3), mode="replicate" if replicate else "constant")
    mean = conv2d(padded, window)
    variance = conv2d(padded**2, window) - mean**2
    return (image - mean) / ((variance.abs() + 1e-8).sqrt() + 1)


def products(x: Tensor) -> Tensor:
    rolled = [x.roll(shift, dims=(2, 3)) for shift in ((0, 1), (1, 0), (1, 1), (-1, 1))]
    return torch.cat([x, *(x * other for other in rolled)], dim=1)


def by_hand(extract: object, group: tuple[str, ...], teacher_seed: int) -> Tensor:
    student, teacher = taps(1, side=SIDE, names=NAMES), taps(teacher_seed, side=SIDE, names=NAMES)
    found = [(extract(convert(student[n])) - extract(convert(teacher[n]))).abs().mean() for n in group]  # type: ignore[operator]
    return torch.stack(found).mean()


@pytest.mark.parametrize("natural", ["maps", "mscn"])
def test_the_encoder_learns_from_teacher_a(natural: str) -> None:
    def extract(image: Tensor) -> Tensor:
        normalised = mscn(image, replicate=False)
        return products(normalised) if natural == "maps" else normalised

    expected = by_hand(extract, ("enc1", "enc2"), teacher_seed=2)
    torch.testing.assert_close(losses(natural=natural)["nc"], expected, rtol=1e-5, atol=1e-7)


def test_the_decoder_learns_from_teacher_b_of_the_clean_image() -> None:
    def extract(image: Tensor) -> Tensor:
        blocks = mscn(image, replicate=True).unfold(2, 16, 16).unfold(3, 16, 16)
        return blocks.flatten(4).var(dim=4)

    expected = by_hand(extract, ("dec1",), teacher_seed=4)
    torch.testing.assert_close(losses()["et"], expected, rtol=1e-5, atol=1e-7)


def test_other_extractors_train_too() -> None:
    student = {name: tap.requires_grad_() for name, tap in taps(1, side=SIDE, names=NAMES).items()}
    method = make("slkd", size=32, natural="features", texture="edges")
    teachers = {"degraded": teacher_of(clean=False), "clean": teacher_of(clean=True)}
    found = losses_of(method, Batch(images(3), images(0)), lambda x: (images(1), student), teachers)
    (found["nc"] + found["et"]).backward()
    for name, tap in student.items():
        assert (tap.grad is None) == (name == "latent"), name
        assert name == "latent" or tap.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_image_losses(temperature: float) -> None:
    found = losses(temperature=temperature)
    torch.testing.assert_close(found["pixel"], (images(1) - images(0)).abs().mean())
    ours, theirs = ((image.flatten(1) / temperature).softmax(dim=1) for image in (images(1), images(2)))
    torch.testing.assert_close(found["kl"], (theirs * (theirs / ours).log()).sum(dim=1).mean())


def test_a_perfect_student_of_teacher_a_has_no_loss_in_the_encoder() -> None:
    found = losses(student_seed=2)
    assert found["nc"] == 0
    assert found["et"] > 0


def test_constant_taps_have_finite_gradients() -> None:
    constant = {name: torch.zeros(B, 5, SIDE, SIDE, dtype=torch.float64, requires_grad=True) for name in NAMES}
    teachers = {"degraded": teacher_of(clean=False), "clean": teacher_of(clean=True)}
    method = make("slkd", size=32, texture="edges")
    found = losses_of(method, Batch(images(3), images(0)), lambda x: (images(1), constant), teachers)
    (found["nc"] + found["et"]).backward()
    assert all(tap.grad is None or tap.grad.isfinite().all() for tap in constant.values())


def test_adapters_are_fitted_to_each_teacher_in_its_place() -> None:
    teachers = {"degraded": teacher_of(clean=False), "clean": teacher_of(clean=True)}
    found = make("slkd").targets(images(3), images(0), teachers)
    for name in NAMES:
        seed = 4 if name == "dec1" else 2
        assert torch.equal(found[name], taps(seed, side=SIDE, names=NAMES)[name])


def test_taps_must_be_of_an_encoder_and_a_decoder() -> None:
    plain: Network = lambda x: (images(2), taps(2))  # noqa: E731
    with pytest.raises(InputError, match=r"named enc\.\.\. and dec"):
        make("slkd").targets(images(3), images(0), {"degraded": plain, "clean": plain})


def test_super_resolution_is_refused_with_the_reason() -> None:
    options = SLKDOptions(name="slkd")
    assert "teacher B the clean image" in options.refusals(Run(scale=2, patch=48))[0][1]
    assert options.refusals(Run(scale=1, patch=64)) == []


def test_teacher_b_may_have_weights_of_its_own() -> None:
    assert make("slkd").requirements().weights == {}
    assert make("slkd", clean_weights="/b.pth").requirements().weights == {"clean": "/b.pth"}
