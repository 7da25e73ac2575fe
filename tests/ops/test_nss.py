"""The natural-scene statistics against their published formulas, in plain float64, and what real photographs say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import kdops
from kdops import nss
from kdops.nss.borders import halved, mirrored
from trainers.data.images import read_image, to_float
from trainers.data.resize import imresize

BACKENDS = [
    b for b in ("cpu", "reference") if kdops.dispatch.SPECS["mscn"].backend(b).supports([torch.zeros(1)]) is None
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def noise(*shape: int, seed: int = 0, scale: float = 255.0) -> Tensor:
    return scale * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(image: Tensor, window: int, sigma: float, c: float, padding: str) -> tuple[Tensor, Tensor]:
    """g * I^2 - (g * I)^2 by two-dimensional convolutions."""
    weights = torch.tensor([math.exp(-((i - window // 2) ** 2) / (2 * sigma**2)) for i in range(window)]).double()
    weights = (weights / weights.sum()).to(image.dtype)
    weights = weights[:, None] * weights
    mode = "constant" if padding == "zeros" else "replicate"

    def blur(t: Tensor) -> Tensor:
        wide = F.pad(t, (window // 2,) * 4, mode=mode).flatten(0, 1).unsqueeze(1)
        return F.conv2d(wide, weights[None, None]).view(t.shape)

    std = ((blur(image * image) - blur(image) ** 2).abs() + 1e-8).sqrt()
    return (image - blur(image)) / (std + c), std


@every_backend
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(2, 40), st.integers(2, 300)),
    window=st.sampled_from([3, 7, 11]),
    padding=st.sampled_from(["zeros", "replicate"]),
    seed=st.integers(0, 9),
)
def test_mscn_is_the_published_formula(
    backend: str, shape: tuple[int, ...], window: int, padding: str, seed: int
) -> None:
    """With gradients; sizes beyond one tile of the kernel, and smaller than the window."""
    image = noise(*shape, seed=seed, scale=2.0).requires_grad_()  # around 255 the published form loses digits
    mine = kdops.mscn(image, window=window, sigma=1.3, c=0.7, padding=padding, backend=backend)
    theirs = published(image, window, 1.3, 0.7, padding)
    upstream = [noise(*shape, seed=seed + n, scale=1.0) for n in (1, 2)]
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    got, wanted = (torch.autograd.grad(outs, image, upstream)[0] for outs in (mine, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@every_backend
@pytest.mark.parametrize("level", [0.0, 1e-3, 255.0, 1e6])
def test_a_constant_image_is_exactly_zero_and_has_a_gradient(backend: str, level: float) -> None:
    image = torch.full((1, 1, 40, 40), level, requires_grad=True)
    normalised, std = kdops.mscn(image, padding="replicate", backend=backend)
    assert normalised.eq(0).all()
    torch.testing.assert_close(std, torch.full_like(std, 1e-4))
    (gradient,) = torch.autograd.grad(normalised.sum() + std.sum(), image)
    assert gradient.isfinite().all()


@every_backend
def test_a_nearly_constant_image_around_255_keeps_its_digits(backend: str) -> None:
    """In float32 the published form is wrong by more than 100 % here."""
    image = (255 + 1e-3 * noise(1, 1, 40, 40, scale=1.0)).float()
    exact = published(image.double() - 255, 7, 7 / 6, 1.0, "replicate")

    def error(found: tuple[Tensor, Tensor]) -> float:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))

    assert error(published(image, 7, 7 / 6, 1.0, "replicate")) > 1
    assert error(kdops.mscn(image, padding="replicate", backend=backend)) < (1e-5 if backend == "cpu" else 5e-2)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("window", [7, 31])
def test_gradients_keep_their_digits_between_edges(window: int, padding: str) -> None:
    """Nearly constant blocks of 0 and 255, whose windows' gradients are 1000 times those of the edges beside them."""
    blocks = (noise(1, 1, 9, 17, seed=3) > 128).double().repeat_interleave(8, -2).repeat_interleave(8, -1)
    image = (255 * blocks + noise(1, 1, 72, 136, scale=1e-3)).float()
    upstream = [noise(*image.shape, seed=seed, scale=2.0) - 1 for seed in (1, 2)]

    def gradient(image: Tensor, backend: str) -> Tensor:
        image = image.requires_grad_()
        outs = kdops.mscn(image, window=window, sigma=window / 6, padding=padding, backend=backend)
        return torch.autograd.grad(outs, image, [u.to(image) for u in upstream])[0]

    exact = gradient(image.double(), "reference")
    assert float((gradient(image, "cpu") - exact).abs().max() / exact.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "wrong", [lambda t: t[..., :-1], lambda t: t.double(), lambda t: t.mT], ids=["shape", "dtype", "strides"]
)
def test_backward_takes_the_results_of_forward(wrong: Callable[[Tensor], Tensor]) -> None:
    image = torch.rand(1, 1, 6, 6)
    normalised, std = kdops.mscn(image, backend="cpu")
    with pytest.raises(RuntimeError, match="normalised"):
        torch.ops.kdops.mscn_backward(std, None, image, wrong(normalised), std, 7, 7 / 6, 1.0, False)


@every_backend
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_be_unused(backend: str, used: int) -> None:
    image = noise(1, 2, 9, 11).requires_grad_()
    (got,) = torch.autograd.grad(kdops.mscn(image, backend=backend)[used].sum(), image)
    (wanted,) = torch.autograd.grad(published(image, 7, 7 / 6, 1.0, "zeros")[used].sum(), image)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "options", [{"window": 4}, {"window": 33}, {"sigma": 0.0}, {"c": -1.0}, {"padding": "reflect"}], ids=str
)
def test_bad_options_are_said(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        kdops.mscn(torch.zeros(1, 1, 4, 4), **options)  # type: ignore[arg-type]


def test_statistics_take_luma() -> None:
    for function in (kdops.brisque_features, kdops.piqe):
        with pytest.raises(ValueError, match="luma"):
            function(torch.zeros(1, 3, 8, 8))


# --- BRISQUE ---------------------------------------------------------------------------------------------------------------------


@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_halving_is_imresize(height: int, width: int) -> None:
    image = noise(2, height, width)
    torch.testing.assert_close(halved(image), imresize(image, 0.5))


@given(size=st.integers(1, 6), before=st.integers(0, 9), after=st.integers(0, 9))
def test_mirrored_repeats_the_border(size: int, before: int, after: int) -> None:
    t = torch.arange(size)
    there_and_back = torch.cat([t, t.flip(0)])
    expected = there_and_back[torch.arange(-before, size + after) % (2 * size)]
    assert mirrored(t, 0, before, after).equal(expected)


def plain_features(x: Tensor) -> list[float]:
    """One scale of one image (H, W), as methods.md 5.1 writes it, number by number."""
    n = published(x[None, None], 7, 7 / 6, 1.0, "zeros")[0][0, 0]
    shapes = [0.2 + 0.001 * i for i in range(9801)]
    r = [math.exp(math.lgamma(1 / g) + math.lgamma(3 / g) - 2 * math.lgamma(2 / g)) for g in shapes]
    rho = float((n**2).mean() / n.abs().mean() ** 2)
    found = [shapes[min(range(9801), key=lambda i: abs(rho - r[i]))], float((n**2).mean())]
    for shift in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        p = n * torch.roll(n, shift, (0, 1))
        left, right = (p[p < 0] ** 2).mean().sqrt(), (p[p > 0] ** 2).mean().sqrt()
        g = float(left / right)
        ratio = float(p.abs().mean() ** 2 / (p**2).mean()) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        a = shapes[min(range(9801), key=lambda i: abs(ratio - 1 / r[i]))]
        mean = float(right - left) * math.gamma(2 / a) / math.sqrt(math.gamma(1 / a) * math.gamma(3 / a))
        found += [a, mean, float(left**2), float(right**2)]
    return found


@every_backend
def test_brisque_features_are_the_published_definition(backend: str) -> None:
    image = noise(1, 1, 33, 46) ** 1.3 / 4
    half = imresize(image[0, 0], 0.5)
    expected = torch.tensor([plain_features(image[0, 0]) + plain_features(half)], dtype=torch.float64)
    torch.testing.assert_close(kdops.brisque_features(image, backend=backend), expected, rtol=1e-6, atol=1e-9)


def test_gaussian_noise_fits_a_gaussian() -> None:
    """The shape of a normal distribution is 2, its deviation the one drawn (methods.md 7)."""
    from kdops.nss.brisque import _fit

    drawn = 3 * torch.randn(1, 1, 700, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape, variance = _fit(drawn)
    assert float(shape) == pytest.approx(2, abs=0.03)
    assert float(variance) == pytest.approx(9, rel=0.01)


@every_backend
@pytest.mark.parametrize("level", [0.0, 128.0])
def test_brisque_features_of_a_constant_image(backend: str, level: float) -> None:
    image = torch.full((1, 1, 24, 24), level, requires_grad=True)
    features = kdops.brisque_features(image, backend=backend)
    (gradient,) = torch.autograd.grad(features.sum(), image)
    assert features.isfinite().all()
    assert gradient.isfinite().all()
    if level == 0:
        assert features[0, :6].tolist() == [10, 0, 10, 0, 0, 0]


# --- PIQE ------------------------------------------------------------------------------------------------------------------------


@every_backend
def test_a_sample_with_nan_has_no_features_and_leaves_the_others(backend: str) -> None:
    """Shapes too are NaN, though they are looked up in a table."""
    image = noise(2, 1, 32, 32)
    alone = kdops.brisque_features(image[1:], backend=backend)
    image[0, 0, 3, 4] = float("nan")
    broken, whole = kdops.brisque_features(image, backend=backend)
    assert broken.isnan().all()
    torch.testing.assert_close(whole[None], alone)


@pytest.mark.parametrize("size", [(32, 24), (24, 32)])
def test_maps_of_other_sizes_than_blocks_are_refused(size: tuple[int, int]) -> None:
    for maps in (kdops.nss.block_variance, kdops.nss.edge_deviations):
        with pytest.raises(ValueError, match="must be multiples of 16: crop or pad them"):
            maps(noise(1, 1, *size))


def plain_piqe(image: Tensor) -> float:
    """One image (H, W) whose sizes are multiples of 16, block by block as methods.md 5.2 writes it."""
    x = (255 * image / image.max()).round()
    n = published(x[None, None], 7, 7 / 6, 1.0, "replicate")[0][0, 0]
    total, active = 0.0, 0
    for block in n.unfold(0, 16, 16).unfold(1, 16, 16).flatten(0, 1):
        v = float(block.var())
        if v <= 0.1:
            continue
        active += 1
        edges = [block[0], block[15], block[:, 0], block[:, 15]]
        artifact = any(float(e[i : i + 6].std()) < 0.1 for e in edges for i in range(11))
        surround = block[:, [i for i in range(16) if i not in (7, 8)]]
        ratio = float(block[:, 7:9].std() / surround.std())
        noisy = math.sqrt(v) > 2 * abs(math.sqrt(v) - ratio) / max(math.sqrt(v), ratio)
        total += artifact * (1 - v) + noisy * v
    return 100 * (total + 1) / (active + 1)


def photograph(folder: Path, name: str) -> Tensor:
    """(3, H, W) float64 in [0, 1]."""
    return to_float(read_image(folder / name)).double()


def grey(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> (1, 1, H, W) in 0..255."""
    weights = image.new_tensor([0.299, 0.587, 0.114])
    return 255 * (image * weights[:, None, None]).sum(dim=0)[None, None]


def test_piqe_is_the_published_definition(shared_data: Path) -> None:
    image = grey(photograph(shared_data, "set5/HR/butterfly.png"))
    assert image.shape[2] % 16 == 0
    assert kdops.piqe(image)[0].item() == pytest.approx(plain_piqe(image[0, 0]), rel=1e-9)


def test_piqe_completes_an_image_to_blocks_by_its_mirror_image() -> None:
    image = noise(1, 1, 37, 20)
    score, artifact, _, activity = kdops.piqe(image)
    completed = mirrored(mirrored(image, -2, 0, 11), -1, 0, 12)
    torch.testing.assert_close(score, kdops.piqe(completed)[0])
    assert artifact.shape == activity.shape == (1, 3, 2)


def test_piqe_does_not_see_the_scale_and_judges_black_as_nothing_active() -> None:
    image = noise(1, 1, 32, 48).round()
    torch.testing.assert_close(kdops.piqe(image / 255)[0], kdops.piqe(image)[0])
    score, *masks = kdops.piqe(torch.zeros(2, 1, 20, 20))
    assert score.tolist() == [100, 100]
    assert not any(mask.any() for mask in masks)


def test_maps_for_losses_have_gradients() -> None:
    normalised = kdops.mscn(noise(2, 1, 32, 16).requires_grad_(), padding="replicate")[0].detach().requires_grad_()
    assert nss.block_variance(normalised).shape == (2, 1, 2, 1)
    assert nss.edge_deviations(normalised).shape == (2, 1, 2, 1, 4, 11)
    assert nss.paired_products(normalised).shape == (2, 4, 32, 16)
    for maps in (nss.block_variance, nss.edge_deviations, nss.paired_products):
        assert torch.autograd.gradcheck(maps, normalised, fast_mode=True)
        flat = torch.zeros_like(normalised, requires_grad=True)
        assert torch.autograd.grad(maps(flat).sum(), flat)[0].isfinite().all()
    with pytest.raises(ValueError, match="multiples of 16"):
        nss.block_variance(normalised[..., :15])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_flat_block_has_a_gradient(dtype: torch.dtype) -> None:
    """In float16 the 1e-8 beside a variance is 0."""
    flat = torch.zeros(1, 1, 16, 16, dtype=dtype, requires_grad=True)
    deviations = nss.edge_deviations(flat)
    assert deviations.dtype == dtype
    assert deviations[0, 0, 0, 0, 0, 0].item() == pytest.approx(1e-4, rel=4e-3)
    assert not torch.autograd.grad(deviations.sum(), flat)[0].any()


@pytest.mark.parametrize("maps", [nss.block_variance, nss.edge_deviations, nss.paired_products])
def test_maps_for_losses_take_maps(maps: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"are \(1, 16, 16\) float32, but they must be \(B, C, H, W\)"):
        maps(torch.ones(1, 16, 16))
    with pytest.raises(TypeError, match="must be floating point"):
        maps(torch.ones(1, 1, 16, 16, dtype=torch.uint8))


@every_backend
def test_a_narrow_window_is_one_pixel(backend: str) -> None:
    """Also where the square of its sigma is 0."""
    image = noise(1, 1, 9, 9).float()
    normalised, std = kdops.mscn(image, sigma=1e-200, backend=backend)
    assert not normalised.any()
    torch.testing.assert_close(std, kdops.mscn(image, window=1, backend=backend)[1])
