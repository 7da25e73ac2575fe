"""trainers.data: samples as a pure function of (seed, step, index), the loader, folders and what is wrong with them."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.config import Data, TrainFolders, ValSet
from trainers.data.degradations import Noise
from trainers.data.folders import PairFiles, match_folders
from trainers.data.images import stored_size, to_float, write_png
from trainers.data.loader import batches
from trainers.data.resize import imresize
from trainers.data.sets import (
    TrainSet,
    cut,
    open_train_set,
    open_val_set,
    shuffled,
    train_problems,
    val_problems,
    window,
)
from trainers.errors import InputError
from trainers.metrics import PROTOCOLS

needs_skimage = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def enlarge(image: Tensor, scale: int) -> Tensor:
    return image.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def write_pairs(folder: Path, sizes: list[tuple[int, int]], scale: int = 2) -> list[PairFiles]:
    """Noise inputs of these sizes (height, width), and ground truths in which every pixel is repeated `scale` times."""
    for number, (height, width) in enumerate(sizes):
        lq = noise(height, width, seed=number)
        write_png(folder / "lq" / f"{number}.png", lq)
        write_png(folder / "gt" / f"{number}.png", enlarge(lq, scale))
    return match_folders(folder / "gt", folder / "lq")[0]


def train_set(folder: Path, sizes: list[tuple[int, int]], patch: int = 8, batch: int = 4) -> TrainSet:
    return TrainSet(write_pairs(folder, sizes), scale=2, patch=patch, batch=batch)


def stack(found: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    steps, lq, gt = zip(*found, strict=True)
    return list(steps), torch.stack(lq), torch.stack(gt)


def test_a_sample_is_a_function_of_seed_step_and_index(tmp_path: Path) -> None:
    first, second = (train_set(tmp_path, [(16, 20), (12, 12)]) for _ in range(2))
    keys = [(seed, step, index) for seed in (0, 7) for step in (0, 1, 50) for index in range(4)]
    expected = {key: first.sample(*key) for key in keys}
    for key in reversed(keys):
        torch.manual_seed(key[1])  # the global generators have no say
        np.random.seed(key[1])
        for mine, other in zip(second.sample(*key), expected[key], strict=True):
            assert torch.equal(mine, other)
    assert len({gt.numpy().tobytes() for _, gt in expected.values()}) == len(keys)


def test_dtype_shape_and_range(tmp_path: Path) -> None:
    lq, gt = train_set(tmp_path, [(16, 20)]).sample(0, 0, 0)
    assert (lq.shape, gt.shape) == ((3, 4, 4), (3, 8, 8))
    assert lq.dtype == gt.dtype == torch.float32
    assert gt.min() >= 0
    assert 0.9 < gt.max() <= 1


@pytest.mark.parametrize("scale", [2, 3])
def test_input_and_ground_truth_show_the_same_place(tmp_path: Path, scale: int) -> None:
    samples = TrainSet(write_pairs(tmp_path, [(16, 20), (9, 30)], scale), scale, patch=4 * scale, batch=4)
    for step, index in itertools.product(range(30), range(4)):
        lq, gt = samples.sample(0, step, index)
        assert torch.equal(enlarge(lq, scale), gt)


def test_inputs_from_a_folder_are_not_degraded_again(tmp_path: Path) -> None:
    """The degradation of the data is for the folders that have no inputs."""
    samples = TrainSet(write_pairs(tmp_path, [(16, 20)]), scale=2, patch=8, batch=4, degradation=Noise(sigma=50.0))
    lq, gt = samples.sample(0, 0, 0)
    assert torch.equal(enlarge(lq, 2), gt)


def test_an_epoch_is_shuffled_without_replacement_by_area(tmp_path: Path) -> None:
    """Images of 4, 2 and 1 patch areas: 4, 2 and 1 of every 7 samples, in another order in each epoch."""
    samples = train_set(tmp_path, [(8, 8), (8, 4), (4, 4)], patch=8, batch=7)
    owner = {}
    for number in range(3):
        for pixel in samples.pairs[number][0].flatten(1).T.tolist():
            owner[tuple(pixel)] = number
    orders = []
    for step in range(20):
        batch = [samples.sample(0, step, index)[0] for index in range(7)]
        orders.append(tuple(owner[tuple((lq[:, 0, 0] * 255).round().int().tolist())] for lq in batch))
    assert all(Counter(order) == {0: 4, 1: 2, 2: 1} for order in orders)
    assert len(set(orders)) > 10


def test_each_seed_has_an_order_of_its_own() -> None:
    assert len({tuple(shuffled(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.tuples(st.integers(1, 6), st.integers(-7, 7), st.integers(1, 9)), st.data())
def test_a_window_is_mirrored_beyond_the_border(rows: tuple[int, int, int], data: st.DataObject) -> None:
    columns = data.draw(st.tuples(st.integers(1, 6), st.integers(-7, 7), st.integers(1, 9)))
    (height, top, h), (width, left, w) = rows, columns
    image = np.arange(2 * height * width).reshape(2, height, width)
    wide = np.pad(image, ((0, 0), (20, 20), (20, 20)), mode="symmetric")
    np.testing.assert_array_equal(
        window(image, top, left, h, w), wide[:, 20 + top : 20 + top + h, 20 + left : 20 + left + w]
    )


def test_epochs_do_not_depend_on_how_steps_cut_them(tmp_path: Path) -> None:
    """Sample 5 is the sixth of the run whether it is row 5 of step 0 or row 1 of step 1: the same image."""
    wide, narrow = (train_set(tmp_path, [(8, 8), (8, 4), (4, 4)], batch=batch) for batch in (8, 4))
    for number in range(40):
        images = []
        for samples in (wide, narrow):
            step, index = divmod(number, samples.batch)
            lq, _ = samples.sample(3, step, index)
            images.append([i for i in range(3) if contains(samples.pairs[i][0], lq[:, 0, 0])])
        assert images[0] == images[1]


def contains(image: Tensor, pixel: Tensor) -> bool:
    return bool((to_float(image) == pixel[:, None, None]).all(dim=0).any())


def test_every_place_and_orientation_is_drawn_evenly(tmp_path: Path) -> None:
    samples = train_set(tmp_path, [(5, 6)], patch=8, batch=1)  # 2 x 3 places of a 4 x 4 input patch
    lq = samples.pairs[0][0].numpy()
    places = itertools.product(range(2), range(3), range(8))
    known = {np.ascontiguousarray(cut(lq, *place[:2], 4, place[2])).tobytes(): place for place in places}
    assert len(known) == 48
    draws = 4800
    drawn = Counter(
        known[(samples.sample(0, step, 0)[0] * 255).round().to(torch.uint8).numpy().tobytes()] for step in range(draws)
    )
    assert len(drawn) == 48
    expected = draws / 48
    chi_squared = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi_squared < 85  # 47 degrees of freedom: exceeded once in 1,700 fair draws, and this draw is fixed


def test_the_eight_orientations_of_a_square() -> None:
    square = noise(4, 4).numpy()
    found = {np.ascontiguousarray(cut(square, 0, 0, 4, symmetry)).tobytes() for symmetry in range(8)}
    turned = [np.rot90(square, k, axes=(1, 2)) for k in range(4)]
    expected = {np.ascontiguousarray(image).tobytes() for turn in turned for image in (turn, turn[:, ::-1])}
    assert found == expected


@needs_skimage
def test_photos_are_downscaled_whole() -> None:
    """A patch of the input is cut from the 8-bit downscaling of the whole photograph: no border effects at its edges."""
    data = Data(train="photos", batch=2, patch=48)
    samples = open_train_set(data, 2, 48)
    for number in (0, 5):
        lq, gt = samples.pairs[number]
        assert torch.equal(imresize(gt, 0.5), lq)
    lq, gt = samples.sample(0, 0, 0)
    assert (lq.shape, gt.shape) == ((3, 24, 24), (3, 48, 48))
    inner = (slice(None), slice(4, -4), slice(4, -4))  # where the patch's own downscaling does not see its border
    assert (imresize(gt, 0.5)[inner] - lq[inner]).abs().max() < 1.1 / 255
    assert train_problems(data, 2, 48) == []


@given(patch=st.sampled_from([8, 12, 20]), batch=st.integers(1, 9), step=st.integers(0, 10**6))
def test_any_patch_batch_and_step(tmp_path_factory: pytest.TempPathFactory, patch: int, batch: int, step: int) -> None:
    folder = tmp_path_factory.mktemp("set")
    lq, gt = train_set(folder, [(10, 13)], patch, batch).samples(1, step, range(batch))
    assert (lq.shape, gt.shape) == ((batch, 3, patch // 2, patch // 2), (batch, 3, patch, patch))


def test_patch_must_fit(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, [(16, 20), (9, 30)])
    with pytest.raises(InputError, match=r"1\.png: 60x18 is smaller than 32x32") as caught:
        TrainSet(files, scale=2, patch=32, batch=1)
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="9 is not a multiple of the scale 2"):
        TrainSet(files, scale=2, patch=9, batch=1)


# --- the loader ---


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    samples = train_set(tmp_path, [(16, 20), (12, 12)])
    alone = stack(list(batches(samples, seed=0, start_step=3, stop_step=12, rows=range(4))))
    found = stack(list(batches(samples, seed=0, start_step=3, stop_step=12, rows=range(4), workers=workers)))
    assert found[0] == alone[0] == list(range(3, 12))
    assert torch.equal(found[1], alone[1])
    assert torch.equal(found[2], alone[2])


def test_batches_may_start_anywhere_and_be_shared_by_ranks(tmp_path: Path) -> None:
    samples = train_set(tmp_path, [(16, 20), (12, 12)])
    _, lq, gt = stack(list(batches(samples, seed=0, start_step=0, stop_step=8, rows=range(4))))
    _, late, _ = stack(list(batches(samples, seed=0, start_step=5, stop_step=8, rows=range(4))))
    assert torch.equal(late, lq[5:])
    _, _, second_half = stack(list(batches(samples, seed=0, start_step=0, stop_step=8, rows=range(2, 4))))
    assert torch.equal(second_half, gt[:, 2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_leaves_the_global_generator_alone(tmp_path: Path, workers: int) -> None:
    samples = train_set(tmp_path, [(16, 20)])
    before = torch.get_rng_state()
    list(batches(samples, seed=0, start_step=0, stop_step=3, rows=range(4), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_later_is_an_input_error(tmp_path: Path, workers: int) -> None:
    samples = train_set(tmp_path, [(16, 20)])
    path = tmp_path / "gt" / "0.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"gt/0\.png: cannot be read") as caught:
        list(batches(samples, seed=0, start_step=0, stop_step=3, rows=range(4), workers=workers))
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_a_worker_killed_while_the_loader_ends_it_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises from a signal handler, wherever this process is; in a __del__ it could only print a traceback."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    made = batches(train_set(tmp_path, [(16, 20)]), seed=0, start_step=0, stop_step=99, rows=range(4), workers=1)
    next(made)
    [worker] = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)  # else it would end before it is killed
    threading.Timer(0.5, worker.kill).start()
    made.close()
    assert not printed
    assert not worker.is_alive()


# --- validation sets ---


def test_val_pairs(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(8, 9), (7, 5)])
    found = open_val_set(ValSet(name="v", gt=f"{tmp_path}/gt", lq=f"{tmp_path}/lq"), 2)
    assert len(found) == 2
    assert [pair.name for pair in found] == ["0", "1"]
    assert torch.equal(found[1].lq, to_float(noise(7, 5, seed=1)))
    assert torch.equal(enlarge(found[0].lq, 2), found[0].gt)


@needs_skimage
def test_val_photos_are_the_held_out_ones() -> None:
    entry = ValSet(name="photos", gt="photos")
    assert [pair.name for pair in open_val_set(entry, 2)] == ["chelsea", "coffee"]
    assert [tuple(pair.gt.shape) for pair in open_val_set(entry, 4)] == [(3, 300, 448), (3, 400, 600)]
    assert val_problems(entry, 2, PROTOCOLS["sr-y"]) == []


# --- problems ---


def folders(tmp_path: Path, template: str = "{}", patch: int = 16) -> Data:
    train = TrainFolders(gt=f"{tmp_path}/gt", lq=f"{tmp_path}/lq", lq_template=template)
    return Data(train=train, patch=patch, batch=1)


def test_all_problems_at_once(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(8, 8)] * 6)
    gt, lq = tmp_path / "gt", tmp_path / "lq"
    (lq / "0.png").unlink()
    (gt / "1.png").unlink()
    (gt / "2.png").write_bytes((gt / "2.png").read_bytes()[:200])
    (lq / "3.png").write_text("not an image")
    write_png(lq / "4.png", noise(8, 5))
    write_png(gt / "5.png", noise(14, 20))
    write_png(lq / "5.png", noise(7, 10))
    (gt / "notes.txt").write_text("no image, no problem")
    problems = train_problems(folders(tmp_path), 2, 16)
    expected = [
        r"gt/0.png: has no input 0.*",
        r"lq/1.png: belongs to no ground truth",
        r"gt/2.png: cannot be read",
        r"lq/3.png: cannot be read",
        r"lq/4.png: 5x8, but 1/2 of 4.png (16x16) is 8x8",
        r"gt/5.png: 20x14 is smaller than 16x16",
    ]
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
    with pytest.raises(InputError) as caught:
        open_train_set(folders(tmp_path), 2, 16)
    assert len(caught.value.problems) == 2  # what is seen without reading any image


def test_template(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(8, 8)])
    (tmp_path / "lq" / "0.png").rename(tmp_path / "lq" / "0x2.png")
    assert train_problems(folders(tmp_path, "{}x2"), 2, 16) == []
    assert len(train_problems(folders(tmp_path), 2, 16)) == 2
    [problem] = train_problems(folders(tmp_path, "x2"), 2, 16)
    assert "has no {}" in problem


def test_names_pair_across_extensions_and_must_be_unique(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(8, 8)])
    (tmp_path / "lq" / "0.png").rename(tmp_path / "lq" / "0.PNG")
    assert train_problems(folders(tmp_path), 2, 16) == []
    (tmp_path / "gt" / "0.bmp").write_bytes(b"")
    [problem, *_] = train_problems(folders(tmp_path), 2, 16)
    assert "the name 0 is taken by 0.bmp" in problem


def test_absent_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "gt").mkdir()
    problems = train_problems(folders(tmp_path), 2, 16)
    assert len(problems) == 2
    assert "gt: holds no images" in problems[0]
    assert "lq: no such folder" in problems[1]


def test_photos_have_no_folder_of_inputs() -> None:
    with pytest.raises(InputError, match="nowhere: holds no inputs of the embedded photographs"):
        open_val_set(ValSet(name="photos", gt="photos", lq="nowhere"), 2)


def test_val_images_must_hold_the_ssim_window(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(7, 8), (8, 8)])
    entry = ValSet(name="v", gt=f"{tmp_path}/gt", lq=f"{tmp_path}/lq")
    for headers_only in (False, True):
        [problem] = val_problems(entry, 2, PROTOCOLS["sr-y"], headers_only=headers_only)
        assert "0.png: 16x14 is smaller than 16x16, the least that protocol sr-y measures" in problem
    assert val_problems(entry, 2, PROTOCOLS["deblur-rgb"]) == []


def test_headers_tell_unreadable_images_and_wrong_pairs_but_not_a_rotation(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(9, 8), (9, 8), (8, 9), (9, 8)])
    write_png(tmp_path / "gt" / "1.png", noise(16, 18))  # its input may be one that EXIF turns
    write_png(tmp_path / "gt" / "3.png", noise(16, 16))
    (tmp_path / "gt" / "0.png").write_text("no image")
    entry = ValSet(name="v", gt=f"{tmp_path}/gt", lq=f"{tmp_path}/lq")
    found = val_problems(entry, 2, PROTOCOLS["sr-y"], headers_only=True)
    assert [problem.partition(", ")[0].partition(" (")[0] for problem in found] == [
        f"{tmp_path}/gt/0.png: cannot be read as an image",
        f"{tmp_path}/lq/3.png: 8x9",
    ]


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_png(tmp_path / "a.png", noise(5, 9))
    assert list(tmp_path.iterdir()) == []


def test_stored_size(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", noise(5, 9))
    assert stored_size(tmp_path / "a.png") == (5, 9)
    with pytest.raises(InputError, match="no such file"):
        stored_size(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(InputError, match="cannot be read"):
        stored_size(tmp_path / "text.png")
