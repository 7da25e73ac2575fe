"""trainers.data.pairs: what is read, what is kept in memory, and what a wrong pair says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers.test_data import enlarge, noise, write_pairs
from trainers.data.degradations import Noise
from trainers.data.folders import PairFiles
from trainers.data.images import read_image, write_png
from trainers.data.pairs import Pairs
from trainers.data.resize import imresize
from trainers.errors import InputError


def test_the_cache_is_bounded_and_drops_the_least_recently_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_pairs(tmp_path, [(8, 8)] * 4)
    one = 3 * (8 * 8 + 16 * 16)
    pairs = Pairs(files, 2, cache_bytes=2 * one)
    read: list[str] = []
    monkeypatch.setattr(
        "trainers.data.pairs.read_image", lambda path, **how: (read.append(path.stem), read_image(path, **how))[1]
    )
    for index in (0, 1, 0, 2, 0, 1):
        pairs[index]
    assert read[::2] == ["0", "1", "2", "1"]  # ground truths; inputs follow them
    for index in range(4):
        assert torch.equal(enlarge(pairs[index][0], 2), pairs[index][1])
        assert pairs._cached_bytes <= 2 * one


def test_an_image_larger_than_the_cache_is_still_served(tmp_path: Path) -> None:
    pairs = Pairs(write_pairs(tmp_path, [(8, 8)]), 2, cache_bytes=10)
    assert pairs[0][1].shape == (3, 16, 16)
    assert pairs._cached_bytes == 0


def test_ground_truth_is_cropped_to_the_input(tmp_path: Path) -> None:
    gt = noise(17, 20)
    write_png(tmp_path / "gt" / "a.png", gt)
    lq, cropped = Pairs([PairFiles("a", tmp_path / "gt" / "a.png", None)], 3)[0]
    assert torch.equal(cropped, gt[:, :15, :18])
    assert torch.equal(lq, imresize(gt[:, :15, :18], 1 / 3))


def test_ground_truth_is_cropped_to_an_input_from_a_file(tmp_path: Path) -> None:
    gt, lq = noise(17, 20), noise(5, 6)
    write_png(tmp_path / "gt.png", gt)
    write_png(tmp_path / "lq.png", lq)
    found = Pairs([PairFiles("a", tmp_path / "gt.png", tmp_path / "lq.png")], 3)[0]
    assert torch.equal(found[0], lq)
    assert torch.equal(found[1], gt[:, :15, :18])


def test_an_input_counts_in_the_cache_where_it_is_an_image_of_its_own(tmp_path: Path) -> None:
    """The input of noise is the ground truth itself, in memory once."""
    files = write_pairs(tmp_path, [(8, 8)] * 3)
    gt, lq = 3 * 16 * 16, 3 * 8 * 8
    ground_truths = [PairFiles(pair.name, pair.gt, None) for pair in files]
    for pairs, size in ((Pairs(files, 2), gt + lq), (Pairs(ground_truths, 1, Noise()), gt)):
        for index in (0, 1, 1):
            pairs[index]
        assert pairs._cached_bytes == 2 * size


def test_an_input_of_another_size_is_refused_when_it_is_read(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, [(8, 8), (8, 8)])
    write_png(tmp_path / "lq" / "1.png", noise(8, 5))
    pairs = Pairs(files, 2)
    assert pairs[0][0].shape == (3, 8, 8)
    with pytest.raises(InputError, match=r"1\.png: 5x8, but 1/2 of 1\.png \(16x16\) is 8x8"):
        pairs[1]


def test_inputs_are_grey_where_ground_truths_are(tmp_path: Path) -> None:
    lq, gt = Pairs(write_pairs(tmp_path, [(8, 9)]), 2, grey=True)[0]
    assert (lq.shape, gt.shape) == ((1, 8, 9), (1, 16, 18))
    assert torch.equal(enlarge(lq, 2), gt)
