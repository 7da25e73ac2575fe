"""SKD against its formulas written out, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.trainers.stand_ins import TAPS, B, images, losses_of, make, network, taps
from trainers.methods import Batch
from trainers.methods.skd import SKD, SKDOptions

SIDE = 16


def skd(**options: object) -> SKD:
    """SKD, calibrated on the fixed teacher."""
    method = make("skd", **options)
    assert isinstance(method, SKD)
    teacher = network(images(2, SIDE), taps(2))
    method.calibrate(((images(3, SIDE), images(0, SIDE)) for _ in range(1)), {"teacher": teacher})
    return method


def losses(method: SKD, student_seed: int = 1) -> dict[str, Tensor]:
    batch = Batch(images(3, SIDE // 2), images(0, SIDE))
    student = network(images(1, SIDE), taps(student_seed))
    return losses_of(method, batch, student, {"teacher": network(images(2, SIDE), taps(2))})


def kernel(x: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    return (1 - (-(x - y).square().flatten(1).mean(dim=1) / (2 * variance)).exp()).mean()


def unit(x: Tensor, dim: int) -> Tensor:
    return x / x.square().sum(dim=dim, keepdim=True).sqrt()


def by_hand(attend: object) -> Tensor:
    """The mean over taps of GK(attend(S, T), T) with sigma^2 = var(T); maps are (B, C, N)."""
    found = []
    for name in TAPS:
        s, t = taps(1)[name].flatten(2), taps(2)[name].flatten(2)
        found.append(kernel(attend(s, t), t, taps(2)[name].var(correction=0)))  # type: ignore[operator]
    return torch.stack(found).mean()


def test_feature_and_pixel() -> None:
    found = losses(skd())
    torch.testing.assert_close(found["feature"], by_hand(lambda s, t: s))
    torch.testing.assert_close(found["pixel"], (images(1, SIDE) - images(0, SIDE)).abs().mean())


@pytest.mark.parametrize(("logits", "temperature"), [("cosine", 0.05), ("dot", 2.0), ("dot", "sqrt")])
def test_channel(logits: str, temperature: float | str) -> None:
    def attend(s: Tensor, t: Tensor) -> Tensor:
        query, key = (unit(t, 2), unit(s, 2)) if logits == "cosine" else (t, s)
        divisor = s.shape[2] ** 0.5 if temperature == "sqrt" else temperature
        return (query @ key.transpose(1, 2) / divisor).softmax(dim=2) @ s  # (1)

    found = losses(skd(logits=logits, channel_temperature=temperature))
    torch.testing.assert_close(found["channel"], by_hand(attend))


@pytest.mark.parametrize(
    ("query", "normalize", "logits"), list(product(["student", "teacher"], ["key", "query"], ["cosine", "dot"]))
)
def test_spatial(query: str, normalize: str, logits: str) -> None:
    def attend(s: Tensor, t: Tensor) -> Tensor:
        asks, asked = (s, t) if query == "student" else (t, s)
        if logits == "cosine":
            asks, asked = unit(asks, 1), unit(asked, 1)
        scores = asked.transpose(1, 2) @ asks / 0.3  # A[m, n]: m of the key, n of the query
        return s @ scores.softmax(dim=1 if normalize == "key" else 2)  # (2)

    found = losses(skd(query=query, normalize=normalize, logits=logits, spatial_temperature=0.3))
    torch.testing.assert_close(found["spatial"], by_hand(attend))


@pytest.mark.parametrize("positive", ["teacher", "gt"])
def test_contrast(positive: str) -> None:
    from trainers.data.resize import imresize

    method = skd(positive=positive, eps=0.01)
    pull = images(2, SIDE) if positive == "teacher" else images(0, SIDE)
    maps = [method.features(x).levels for x in (images(1, SIDE), pull, imresize(images(3, SIDE // 2), 2))]
    expected = torch.zeros(B, dtype=torch.float64)
    for weight, a, p, n in zip([1 / 16, 1 / 8, 1 / 4, 1], *maps, strict=True):
        toward, away = ((a - other).abs().flatten(1).mean(dim=1) for other in (p, n))
        expected += weight * toward / (away + 0.01 * p.abs().flatten(1).mean(dim=1))
    torch.testing.assert_close(losses(method)["contrast"], expected.mean())


def test_adaptive_sigma_reads_the_same_whatever_the_distance() -> None:
    """Its loss is near 1 - exp(-1/2) = 0.3935 (methods.md 8), and it is a function of the whole batch: it cannot be split."""
    found = losses(skd(sigma="adaptive"))
    for name in ("feature", "channel", "spatial"):
        assert found[name] == pytest.approx(0.3935, abs=0.05), name
    assert "whole batch" in str(SKDOptions(name="skd", sigma="adaptive").indivisible)
    assert SKDOptions(name="skd").indivisible is None


def test_no_gradient_passes_through_an_adaptive_sigma() -> None:
    distances = [torch.rand(B, dtype=torch.float64, requires_grad=True) for _ in TAPS]
    skd(sigma="adaptive").of_distances(distances).backward()
    for distance in distances:
        variance = distance.detach().mean()
        expected = (-distance.detach() / (2 * variance)).exp() / (2 * variance) / (B * len(TAPS))
        torch.testing.assert_close(distance.grad, expected)


def test_a_constant_tap_has_a_sigma() -> None:
    """A dead one too: its variance is 0, or less by a rounding."""
    method = make("skd")
    constant = {name: torch.full_like(tap, 0.1) for name, tap in taps(0).items()}
    method.calibrate([(images(0)[:1], images(0)[:1])], {"teacher": lambda x: (x, constant)})
    assert method.sigmas == pytest.approx([1e-6] * len(TAPS))


def test_a_number_is_the_sigma_of_all_taps() -> None:
    assert skd(sigma=0.5).widths(len(TAPS)) == [0.5] * len(TAPS)


def test_a_resume_may_choose_another_sigma() -> None:
    """What was measured stays in the checkpoint, whatever is used; one of a number, as older ones have, is overruled too."""
    measured, number = skd(), skd(sigma=0.5)
    assert number.sigmas == measured.sigmas
    number.load_state_dict(measured.state_dict(), strict=False)
    assert number.widths(len(TAPS)) == [0.5] * len(TAPS)
    measured.load_state_dict(number.state_dict(), strict=False)
    assert measured.widths(len(TAPS)) == measured.sigmas == number.sigmas
    number.set_extra_state([0.25] * len(TAPS))
    assert number.widths(len(TAPS)) == [0.5] * len(TAPS)


def test_a_perfect_student_has_next_to_no_loss() -> None:
    """With S = T the features' distance is 0, and cosine logits at the default temperatures leave little (methods.md 7 and 8)."""
    wide = {
        name: torch.randn(B, 24, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) for name in TAPS
    }
    same = network(images(2, SIDE), wide)
    method = make("skd")
    method.calibrate([(images(3, SIDE), images(0, SIDE))], {"teacher": same})
    found = losses_of(method, Batch(images(3, SIDE // 2), images(2, SIDE)), same, {"teacher": same})
    assert found["feature"] == 0
    assert found["channel"] < 1e-3
    assert found["spatial"] < 1e-3
    assert found["contrast"] == 0


def test_the_kernel_is_between_0_and_1_and_flat_at_both_ends() -> None:
    """methods.md 7: GK(x, x) = 0, GK < 1, the gradient exp(-d / 2 sigma^2) (x - y) / (n sigma^2) vanishes at d = 0 and d >> sigma^2."""
    method, gradients = make("skd"), []  # sigma is 1 before calibration
    assert isinstance(method, SKD)
    y = taps(2)["t1"]
    for size in (0.0, 1.0, 1e3):
        x = (y + size).requires_grad_()
        loss = method.kernel([(x, y)])
        loss.backward()
        assert 0 <= loss <= 1
        assert x.grad is not None
        gradients.append(float(x.grad.abs().max()))
    assert gradients[0] == 0
    assert gradients[1] > 1e-3
    assert gradients[2] < 1e-12


def test_max_tokens_pools_before_the_attention_between_positions() -> None:
    assert skd(max_tokens=4).pooled(taps(1)["t1"]).shape[2:] == (2, 2)
    assert losses(skd(max_tokens=9))["spatial"] == losses(skd())["spatial"]
    assert losses(skd(max_tokens=4))["spatial"] != losses(skd())["spatial"]


def test_a_thin_map_is_pooled_to_one_row() -> None:
    assert skd(max_tokens=4).pooled(torch.rand(1, 2, 1, 100)).shape[2] == 1


def test_sigmas_are_part_of_the_state() -> None:
    one, two = skd(), make("skd")
    two.load_state_dict(one.state_dict(), strict=False)  # as the trainer does: feature networks are in no checkpoint
    assert isinstance(two, SKD)
    assert two.sigmas == one.sigmas
    assert len(two.sigmas) == len(TAPS)
