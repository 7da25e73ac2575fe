"""trainers.data.degradations: their statistics, and that they are functions of (seed, step, index) or of the image's name."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.trainers.tiny import write_images
from trainers.config import Data, TrainFolders, ValSet
from trainers.data.degradations import AnyDegradation, Bicubic, Degradation, GaussianBlur, MotionBlur, Noise, Rain
from trainers.data.degradations.blur import correlate, gaussian
from trainers.data.degradations.splat import splat
from trainers.data.images import to_uint8, write_png
from trainers.data.resize import imresize
from trainers.data.sets import TrainSet, open_train_set, open_val_set
from trainers.errors import InputError

Image = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

RANDOM_ONES: list[AnyDegradation] = [Noise(), Noise(sigma=[0.0, 50.0]), Rain(), MotionBlur(), GaussianBlur()]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def opened(folder: Path, degradation: AnyDegradation, *, grey: bool = False) -> TrainSet:
    if not (folder / "gt").is_dir():
        write_images(folder / "gt", 2, (64, 72))
    data = Data(train=TrainFolders(gt=f"{folder}/gt"), degradation=degradation, grey=grey, patch=32, batch=4)
    return open_train_set(data, 1, 32)


# --- samples ---


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=repr)
def test_an_input_is_a_function_of_seed_step_and_index(tmp_path: Path, degradation: AnyDegradation) -> None:
    first, second = (opened(tmp_path, degradation) for _ in range(2))
    keys = [(seed, step, index) for seed in (0, 7) for step in (0, 1) for index in range(4)]
    expected = {key: first.sample(*key) for key in keys}
    for key in reversed(keys):
        for mine, other in zip(second.sample(*key), expected[key], strict=True):
            assert torch.equal(mine, other)
    residuals = {(lq - gt).numpy().tobytes() for lq, gt in expected.values()}
    assert len(residuals) == len(keys)
    lq, gt = first.samples(7, 1, [2, 3])
    assert torch.equal(lq[0], expected[7, 1, 2][0])
    assert torch.equal(gt[1], expected[7, 1, 3][1])


def test_chance_is_drawn_anew_for_each_sample_and_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn itself: inputs minus ground truths differ by their rounding, also under one and the same noise."""
    monkeypatch.setattr(Noise, "degrade", lambda self, image, random: torch.full_like(image, random.random()))
    samples = opened(tmp_path, Noise())
    keys = list(itertools.product((0, 7), (0, 1), range(4)))
    assert len({samples.sample(*key)[0][0, 0, 0].item() for key in keys}) == len(keys)
    found = open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt", degradation=Noise()), 1)
    assert len({pair.lq[0, 0, 0].item() for pair in found}) == len(found) == 2


def test_the_ground_truth_does_not_depend_on_the_degradation(tmp_path: Path) -> None:
    """Methods and degradations are compared on the same patches."""
    noisy, rainy = opened(tmp_path, Noise()), opened(tmp_path, Rain())
    for step in range(5):
        assert torch.equal(noisy.sample(0, step, 1)[1], rainy.sample(0, step, 1)[1])


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=repr)
def test_an_evaluated_input_is_a_function_of_the_image_name(tmp_path: Path, degradation: AnyDegradation) -> None:
    write_images(tmp_path / "gt", 3)
    found = {
        pair.name: pair for pair in open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt", degradation=degradation), 1)
    }
    (tmp_path / "gt" / "image0.png").unlink()
    fewer = open_val_set(ValSet(name="b", gt=f"{tmp_path}/gt"), 1, Data(degradation=degradation))
    assert [pair.name for pair in fewer] == ["image1", "image2"]
    for pair in fewer:
        assert torch.equal(pair.lq, found[pair.name].lq)
    residuals = {(pair.lq - pair.gt).numpy().tobytes() for pair in found.values()}
    assert len(residuals) == 3


def test_inputs_from_a_folder_are_left_as_they_are(tmp_path: Path) -> None:
    for folder in ("gt", "lq"):
        write_images(tmp_path / folder, 1, seed=len(folder))
        (tmp_path / folder / "image0.png").rename(tmp_path / folder / "a.png")
    entry = ValSet(name="a", gt=f"{tmp_path}/gt", lq=f"{tmp_path}/gt", degradation=Noise())
    [pair] = open_val_set(entry, 1)
    assert torch.equal(pair.lq, pair.gt)


# --- noise ---


@pytest.mark.parametrize("sigma", [0.0, 15.0, 50.0])
def test_noise_has_its_standard_deviation(sigma: float) -> None:
    image = torch.full((3, 200, 200), 0.5)
    noise = (Noise(sigma=sigma).degrade(image, random()) - image).double() * 255
    count = noise.numel()
    assert abs(noise.mean().item()) <= 4 * sigma / math.sqrt(count)
    assert noise.std().item() == pytest.approx(sigma, rel=4 / math.sqrt(2 * count), abs=1e-12)
    if sigma:
        standard = noise / sigma
        assert standard.pow(4).mean().item() == pytest.approx(
            3, abs=4 * math.sqrt(96 / count)
        )  # a Gaussian's fourth moment
        for shifted in (
            standard.roll(1, 0),
            standard.roll(1, 1),
            standard.roll(1, 2),
        ):  # white, in space and over channels
            assert abs((standard * shifted).mean().item()) < 4 / math.sqrt(count)


def test_noise_is_not_clipped() -> None:
    white = torch.ones(3, 50, 50)
    assert Noise(sigma=25.0).degrade(white, random()).max() > 1.1


def test_a_range_of_sigma_is_drawn_evenly() -> None:
    image = torch.zeros(1, 40, 40)
    sigmas = torch.tensor([Noise(sigma=[10.0, 50.0]).degrade(image, random(seed)).std() * 255 for seed in range(300)])
    assert 9 < sigmas.min() < 12
    assert 48 < sigmas.max() < 53
    assert sigmas.mean().item() == pytest.approx(30, abs=4 * 40 / math.sqrt(12 * 300))


# --- rain ---

STEADY = {"density": 3.0, "length": 20.0, "width": 1.5, "angle": 10.0, "brightness": 0.4}


def rain(**changed: float | list[float]) -> Rain:
    return Rain.model_validate({**STEADY, **changed})


def test_rain_has_its_density_everywhere() -> None:
    """The mean of the streaks is density / 1000 * 2/3 * length * width * brightness, at the border as in the middle."""
    many = np.mean([rain().streaks(60, 80, random(seed)) for seed in range(400)], axis=0)
    expected = 3 / 1000 * 2 / 3 * 20 * 1.5 * 0.4
    assert many.mean() == pytest.approx(expected, rel=0.02)
    for edge in (many[:4], many[-4:], many[:, :4], many[:, -4:]):
        assert edge.mean() == pytest.approx(expected, rel=0.08)


def test_the_number_of_streaks_is_drawn_for_each_sample() -> None:
    wide = [rain(density=[1.0, 9.0]).streaks(100, 100, random(seed)).mean() for seed in range(200)]
    steady = [rain(density=5.0).streaks(100, 100, random(seed)).mean() for seed in range(200)]
    assert np.mean(wide) == pytest.approx(np.mean(steady), rel=0.1)
    assert np.std(wide) > 2 * np.std(steady)


def single_streaks(degradation: Rain, mass: float) -> list[Image]:
    """Rain of one streak that lies whole inside the image, known by its mass."""
    found = []
    for seed in range(150):
        streaks = degradation.streaks(100, 100, random(seed))
        touches = any(edge.any() for edge in (streaks[0], streaks[-1], streaks[:, 0], streaks[:, -1]))
        if not touches and 0 < streaks.sum() < 1.5 * mass:
            found.append(streaks)
    assert len(found) > 15
    return found


@pytest.mark.parametrize("angle", [-40.0, 0.0, 25.0])
def test_streaks_lie_along_their_angle(angle: float) -> None:
    """Positive angles lean from top left to bottom right. From the moments of a streak."""
    slanted = rain(angle=angle, spread=0.0, density=0.02)
    for streak in single_streaks(slanted, 2 / 3 * 20 * 1.5 * 0.4):
        rows, columns = (axis - (axis * streak).sum() / streak.sum() for axis in np.mgrid[0:100, 0:100])
        rr, cc, rc = ((moment * streak).sum() for moment in (rows**2, columns**2, rows * columns))
        assert np.rad2deg(0.5 * np.arctan2(2 * rc, rr - cc)) == pytest.approx(angle, abs=2)


@pytest.mark.parametrize(("length", "width", "brightness"), [(12.0, 1.0, 0.5), (31.0, 2.5, 0.3)])
def test_one_streak_has_its_length_width_and_brightness(length: float, width: float, brightness: float) -> None:
    upright = rain(length=length, width=width, brightness=brightness, angle=0.0, spread=0.0, density=0.02)
    mass = 2 / 3 * length * width * brightness
    for streak in single_streaks(upright, mass):
        assert streak.sum() == pytest.approx(mass, rel=0.02)
        assert len(np.flatnonzero(streak.any(axis=1))) == pytest.approx(length, abs=2)
        assert streak.sum(axis=1).max() == pytest.approx(width * brightness, rel=0.02)
        assert len(np.flatnonzero(streak.any(axis=0))) == pytest.approx(width, abs=2.1)


def test_rain_brightens_all_channels_alike_and_looks_like_a_file() -> None:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    image = (image * 255).round() / 255
    rainy = Rain().degrade(image, random())
    added = rainy - image
    assert added.min() >= 0
    assert rainy.max() <= 1
    torch.testing.assert_close((rainy * 255).round(), rainy * 255, atol=1e-4, rtol=0)
    unclipped = (rainy < 1).all(dim=0)
    torch.testing.assert_close(added[0][unclipped], added[2][unclipped], atol=1.01 / 255, rtol=0)
    assert rainy.dtype == torch.float32


def test_no_rain_changes_nothing() -> None:
    image = torch.rand(3, 20, 20).mul(255).round() / 255
    torch.testing.assert_close(rain(density=0.0).degrade(image, random()), image, atol=1e-6, rtol=0)


def test_the_least_of_everything_changes_nothing() -> None:
    image = torch.rand(3, 20, 20).mul(255).round() / 255
    for nothing in (
        Noise(sigma=0.0),
        rain(length=0.0),
        rain(width=0.0),
        MotionBlur(length=0.0),
        GaussianBlur(sigma=0.0),
    ):
        margin = nothing.margin()
        wide = torch.nn.functional.pad(image, (margin,) * 4, mode="reflect")
        torch.testing.assert_close(nothing.degrade(wide, random()), image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [-1e-3, -5.0, 1e6, math.nan, math.inf, [-1.0, 2.0], [1.0, math.inf], [math.nan, 2.0]])
@pytest.mark.parametrize("kind", [Noise, Rain, MotionBlur, GaussianBlur])
def test_every_number_is_bounded(kind: type[Degradation], wrong: float | list[float]) -> None:
    for option in set(kind.model_fields) - {"name", "angle"}:
        with pytest.raises(ValidationError, match=rf"{option}\n|{option}\.(number|list)"):
            kind.model_validate({"name": kind.model_fields["name"].default, option: wrong})


def test_a_bound_is_named() -> None:
    with pytest.raises(ValidationError, match="must be from -180 to 180"):
        Rain(angle=[0.0, 270.0])


def test_splat_keeps_mass_and_place() -> None:
    image = splat(np.array([1.25]), np.array([2.0]), np.array([4.0]), 4, 5)
    assert image[1, 2] == 3
    assert image[2, 2] == 1
    assert image.sum() == 4
    assert splat(np.array([-0.5]), np.array([0.0]), np.array([1.0]), 2, 2)[0, 0] == 0.5  # the other half falls outside


# --- blur ---


@pytest.mark.parametrize("length", [1.0, 7.5, 30.0])
@pytest.mark.parametrize("bend", [0.0, 60.0, 400.0])
def test_motion_kernels_sum_to_1_and_do_not_shift_the_image(length: float, bend: float) -> None:
    motion = MotionBlur(length=length, bend=bend)
    for seed in range(20):
        kernel = motion.kernel(random(seed))
        assert kernel.shape == (2 * motion.margin() + 1,) * 2
        assert kernel.min() >= 0
        assert kernel.sum() == pytest.approx(1, abs=1e-12)
        for axis in np.mgrid[0 : kernel.shape[0], 0 : kernel.shape[1]]:
            assert (axis * kernel).sum() == pytest.approx(motion.margin(), abs=1e-9)


def test_straight_motion_has_its_length_and_any_direction() -> None:
    """The variance along a straight path of length L is L^2 / 12, and a pixel's width more."""
    angles = []
    for seed in range(100):
        kernel = MotionBlur(length=24.0, bend=0.0).kernel(random(seed))
        rows, columns = (axis - (axis * kernel).sum() for axis in np.mgrid[0 : kernel.shape[0], 0 : kernel.shape[1]])
        moments = [[(a * b * kernel).sum() for a in (rows, columns)] for b in (rows, columns)]
        across, along = np.linalg.eigvalsh(moments)
        assert along == pytest.approx(24**2 / 12, rel=0.03)
        assert across < 0.3
        angles.append(math.atan2(2 * moments[0][1], moments[1][1] - moments[0][0]))
    assert abs(np.exp(1j * np.array(angles)).mean()) < 0.25


@pytest.mark.parametrize("degradation", [MotionBlur(), GaussianBlur()], ids=repr)
def test_blur_keeps_the_mean_and_flat_images(tmp_path: Path, degradation: MotionBlur | GaussianBlur) -> None:
    margin = degradation.margin()
    flat = torch.full((3, 20 + 2 * margin, 30 + 2 * margin), 100 / 255)
    torch.testing.assert_close(degradation.degrade(flat, random()), flat[:, :20, :30], atol=1e-5, rtol=0)
    write_images(tmp_path / "gt", 1, (96, 96))
    [pair] = open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt", degradation=degradation), 1)
    assert pair.lq.shape == pair.gt.shape
    assert pair.lq.mean().item() == pytest.approx(pair.gt.mean().item(), abs=0.01)  # the mirrored border counts too
    assert pair.lq.std() < pair.gt.std()


def test_blur_looks_beyond_the_patch(tmp_path: Path) -> None:
    """A patch is blurred as a part of its image, not as an image of its own."""
    write_images(tmp_path / "gt", 1, (80, 80))
    degradation = GaussianBlur(sigma=2.0)
    [whole] = open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt", degradation=degradation), 1)
    samples = opened(tmp_path, degradation)
    blurred = {
        whole.lq[:, top : top + 32, left : left + 32].numpy().tobytes() for top in range(49) for left in range(49)
    }
    turned = [samples.sample(0, step, 0)[0] for step in range(40)]
    found = sum(image.contiguous().numpy().tobytes() in blurred for image in turned)
    assert found >= 2  # an eighth of the patches keeps the image's orientation
    assert all(image.shape == (3, 32, 32) for image in turned)


def test_correlate_is_the_convolution_of_torch() -> None:
    image = torch.rand(3, 12, 15, dtype=torch.float64)
    kernel = np.random.default_rng(0).random((5, 3))
    expected = torch.conv2d(image[:, None], torch.from_numpy(kernel)[None, None])[:, 0]
    torch.testing.assert_close(correlate(image, kernel), expected)


# --- bicubic ---


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
def test_bicubic_uses_its_border(tmp_path: Path, border: str) -> None:
    write_images(tmp_path / "gt", 1)
    degradation = Bicubic.model_validate({"border": border})
    [pair] = open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt", degradation=degradation), 2)
    assert torch.equal(to_uint8(pair.lq), imresize(to_uint8(pair.gt), 0.5, border=degradation.border))


@pytest.mark.parametrize(("dataset", "scale"), [("set14", 4), ("b100", 4)])
def test_replicate_gives_the_shipped_inputs(shared_data: Path, dataset: str, scale: int) -> None:
    folder = shared_data / dataset
    shipped = ValSet(name="a", gt=f"{folder}/HR", lq=f"{folder}/LR_bicubic/X{scale}", lq_template=f"{{}}x{scale}")
    made = ValSet(name="b", gt=f"{folder}/HR", degradation=Bicubic(border="replicate"))
    pairs = zip(open_val_set(shipped, scale), open_val_set(made, scale), strict=True)
    assert all(torch.equal(one.lq, two.lq) for one, two in itertools.islice(pairs, 4))


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.0, 2.5, 4.0])
def test_a_gaussian_has_its_deviation_and_is_cut_off_at_four(sigma: float) -> None:
    reach = GaussianBlur(sigma=sigma).margin()
    weights = gaussian(sigma, reach)
    assert len(weights) == 2 * reach + 1
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights @ np.arange(-reach, reach + 1) ** 2 == pytest.approx(sigma**2, rel=0.02)
    np.testing.assert_allclose(weights, gaussian(sigma, reach + 3)[3:-3])


def drawn_points(monkeypatch: pytest.MonkeyPatch, degradation: str) -> list[tuple[Points, Points]]:
    """The rows and columns of the points that a degradation draws from now on."""
    found: list[tuple[Points, Points]] = []

    def recorded(rows: Points, columns: Points, mass: Points, height: int, width: int) -> Points:
        found.append((rows, columns))
        return splat(rows, columns, mass, height, width)

    monkeypatch.setattr(f"trainers.data.degradations.{degradation}.splat", recorded)
    return found


@pytest.mark.parametrize("bend", [0.0, 30.0, 90.0])
def test_a_path_turns_by_its_bend_from_end_to_end(monkeypatch: pytest.MonkeyPatch, bend: float) -> None:
    paths = drawn_points(monkeypatch, "blur")
    for seed in range(400):
        MotionBlur(length=20.0, bend=bend).kernel(random(seed))
    turned = []
    for rows, columns in paths:
        directions = np.unwrap(np.arctan2(np.diff(rows), np.diff(columns)))
        turned.append(np.rad2deg(directions[-1] - directions[0]))
    assert np.std(turned) == pytest.approx(bend, rel=0.12, abs=1e-6)


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_streaks_spread_around_the_wind(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    drawn = drawn_points(monkeypatch, "rain")
    Rain(density=100.0, angle=25.0, spread=spread).streaks(100, 100, random())
    [(rows, columns)] = drawn
    down, right = ((axis[:, -1, 0] - axis[:, 0, 0]) for axis in (rows, columns))
    angles = np.rad2deg(np.arctan2(right, down))
    assert len(angles) > 1000
    assert angles.mean() == pytest.approx(25.0, abs=0.6)
    assert angles.std() == pytest.approx(spread, rel=0.1, abs=1e-6)


# --- grey ---


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=repr)
def test_grey_images_have_one_channel(tmp_path: Path, degradation: AnyDegradation) -> None:
    lq, gt = opened(tmp_path, degradation, grey=True).sample(0, 0, 0)
    assert lq.shape == gt.shape == (1, 32, 32)
    assert not torch.equal(lq, gt)


def test_grey_is_the_luma(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 200]], dtype=torch.uint8)
    write_png(tmp_path / "gt" / "a.png", colours.T.reshape(3, 1, 4).repeat(1, 12, 3).contiguous())
    [pair] = open_val_set(ValSet(name="a", gt=f"{tmp_path}/gt"), 1, Data(degradation=Noise(sigma=0.0), grey=True))
    assert (pair.gt[:, 0, :4] * 255).round().tolist() == [[76, 150, 29, 200]]


# --- excluded and several inputs ---


def test_excluded_images_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "gt", 4)
    data = Data(train=TrainFolders(gt=f"{tmp_path}/gt", exclude=["image1", "image3"]), patch=16, batch=1)
    assert [pair.name for pair in open_train_set(data, 2, 16).pairs.files] == ["image0", "image2"]
    wrong = data.model_copy(update={"train": TrainFolders(gt=f"{tmp_path}/gt", exclude=["image7"])})
    with pytest.raises(InputError, match="exclude: image7 is the name of no image"):
        open_train_set(wrong, 2, 16)


def test_several_training_folders(tmp_path: Path) -> None:
    folders = [TrainFolders(gt=str(write_images(tmp_path / name, count))) for name, count in (("one", 2), ("two", 3))]
    train = open_train_set(Data(train=folders, patch=16, batch=1), 2, 16)
    assert [pair.gt.parent.name for pair in train.pairs.files] == ["one"] * 2 + ["two"] * 3
    with pytest.raises(InputError) as caught:
        open_train_set(Data(train=[*folders, TrainFolders(gt=f"{tmp_path}/three")], patch=16, batch=1), 2, 16)
    assert "three: no such folder" in caught.value.problems[0]


def image_of(value: int) -> Tensor:
    return torch.full((3, 16, 16), value, dtype=torch.uint8)


def test_several_inputs_of_one_ground_truth(tmp_path: Path) -> None:
    for value, name in enumerate(["1", "10", "1_0"]):
        write_png(tmp_path / "gt" / f"{name}.png", image_of(value))
        for number in range(2):
            write_png(tmp_path / "lq" / f"{name}_r{number}.png", image_of(value))
    entry = ValSet(name="a", gt=f"{tmp_path}/gt", lq=f"{tmp_path}/lq", lq_template="{}_*")
    found = list(open_val_set(entry, 1))
    assert [pair.name for pair in found] == ["1_r0", "1_r1", "10_r0", "10_r1", "1_0_r0", "1_0_r1"]
    assert all(torch.equal(pair.lq, pair.gt) for pair in found)
    (tmp_path / "lq" / "1_r0.png").rename(tmp_path / "lq" / "2_r0.png")
    (tmp_path / "lq" / "1_r1.png").rename(tmp_path / "lq" / "2_r1.png")
    with pytest.raises(InputError) as caught:
        list(open_val_set(entry, 1))
    assert [problem.split(": ")[1][:25] for problem in caught.value.problems] == [
        "has no input 1_*.* in " + f"{tmp_path}"[:3],
        "belongs to no ground trut",
        "belongs to no ground trut",
    ]
