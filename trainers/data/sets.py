"""Training samples as a pure function of (seed, step, index), and validation pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainers.data.degradations import Degradation
from trainers.data.folders import LeastSide, PairFiles, image_problems, match_folders, too_small
from trainers.data.images import stored_size, to_float
from trainers.data.pairs import Pairs
from trainers.data.photos import HELD_OUT_PHOTOS, TRAIN_PHOTOS, match_photos
from trainers.errors import InputError
from trainers.randomness import random_words

if TYPE_CHECKING:  # the config imports the networks; the data needs only its types
    from trainers.config import Data, TrainFolders, ValSet
    from trainers.metrics import Protocol

Pixels = npt.NDArray[Any]  # uint8 or uint16


class TrainSet:
    """Random patches of the training images.

    The samples of a run are numbered: number = step * batch + index. Consecutive numbers walk through epochs; an epoch is
    a shuffled list, without replacement, in which each image stands once per patch area that it has (rounded, at least
    once), so that every part of every photograph is equally likely. Position in the image and one of the eight flips and
    rotations are drawn for each sample, and so is what the degradation leaves to chance. All of it is computed from (seed,
    step, index) alone: any rank or worker, in any order, before or after a resume, makes the same sample.
    """

    def __init__(
        self,
        files: Sequence[PairFiles],
        scale: int,
        patch: int,
        batch: int,
        degradation: Degradation | None = None,
        *,
        grey: bool = False,
    ) -> None:
        """`patch` is the side of the ground-truth patch in pixels; InputError for images smaller than that.

        `degradation` makes the inputs of pairs without an input file (None: bicubic downscaling). `grey` images
        have one channel, C = 1; others C = 3.
        """
        if patch % scale:
            raise InputError(f"data.patch: {patch} is not a multiple of the scale {scale}")
        sizes = [stored_size(pair.gt) for pair in files]
        least = least_for_training(patch)
        problems = [text for pair, size in zip(files, sizes, strict=True) for text in too_small(pair.gt, size, least)]
        if problems:
            raise InputError(problems)
        self.pairs = Pairs(files, scale, degradation, grey=grey)
        self.scale = scale
        self.patch = patch
        self.batch = batch
        patches = [max(1, round(height * width / patch**2)) for height, width in sizes]
        self._epoch = np.repeat(np.arange(len(files)), patches)

    def sample(self, seed: int, step: int, index: int) -> tuple[Tensor, Tensor]:
        """Sample `index` of the effective batch of `step`: lq (C, patch / scale, patch / scale), gt (C, patch, patch)."""
        lq, gt = self.samples(seed, step, [index])
        return lq[0], gt[0]

    def samples(self, seed: int, step: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several samples of a step: lq (n, C, patch / scale, patch / scale), gt (n, C, patch, patch), float32 in [0, 1]."""
        made = [self._sample(seed, step, index) for index in indices]
        lq, gt = (torch.stack(images) for images in zip(*made, strict=True))
        return lq, gt

    def _sample(self, seed: int, step: int, index: int) -> tuple[Tensor, Tensor]:
        """A patch of the input, and the same place of the ground truth."""
        epoch, place = divmod(step * self.batch + index, len(self._epoch))
        image = self._epoch[shuffled(seed, epoch, len(self._epoch))[place]]
        lq, gt = (pixels.numpy() for pixels in self.pairs[int(image)])
        degradation = self.pairs.degradation if self.pairs.files[image].lq is None else None
        margin = degradation.margin() if degradation else 0
        down, right, symmetry = random_words("sample", seed, step, index)
        side = self.patch // self.scale
        top, left = down % (lq.shape[1] - side + 1), right % (lq.shape[2] - side + 1)
        lq = cut(lq, top - margin, left - margin, side + 2 * margin, symmetry)
        gt = cut(gt, top * self.scale, left * self.scale, self.patch, symmetry)
        made = as_sample(lq)
        if degradation:
            made = degradation.degrade(made, generator("degrade", seed, step, index))
        return made, as_sample(gt)


def as_sample(pixels: Pixels) -> Tensor:
    """uint8 or uint16 of any strides -> float32 in [0, 1]."""
    return to_float(torch.from_numpy(np.ascontiguousarray(pixels)))


def cut(image: Pixels, top: int, left: int, side: int, symmetry: int) -> Pixels:
    """A square (C, side, side) of the image, mirrored beyond its border, in one of the eight orientations of a square."""
    square = window(image, top, left, side, side)
    if symmetry & 1:
        square = square[:, ::-1]
    if symmetry & 2:
        square = square[:, :, ::-1]
    return square.transpose(0, 2, 1) if symmetry & 4 else square


def window(image: Pixels, top: int, left: int, height: int, width: int) -> Pixels:
    """A rectangle (C, height, width): a view where it lies inside the image, beyond the border the image is mirrored."""
    if top >= 0 and left >= 0 and top + height <= image.shape[1] and left + width <= image.shape[2]:
        return image[:, top : top + height, left : left + width]
    rows, columns = mirrored(top, height, image.shape[1]), mirrored(left, width, image.shape[2])
    return image[:, rows[:, None], columns]


def mirrored(start: int, count: int, size: int) -> npt.NDArray[np.int64]:
    """`count` indices from `start` on; those beyond 0 .. size - 1 are mirrored, the edge repeated."""
    index = np.arange(start, start + count) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but the purpose and the key."""
    return np.random.Generator(np.random.PCG64(random_words(purpose, *key)))


@lru_cache(maxsize=4)
def shuffled(seed: int, epoch: int, length: int) -> npt.NDArray[np.int64]:
    """The permutation of an epoch."""
    return np.random.Generator(np.random.PCG64(random_words("epoch", seed, epoch)[0])).permutation(length)


class ValPair(NamedTuple):
    """One image of a validation set."""

    name: str
    lq: Tensor
    """(C, h, w), float32; in [0, 1], but for noise, which is not clipped."""
    gt: Tensor
    """(C, scale * h, scale * w), float32 in [0, 1]; C = 1 for grey images, else 3."""


class ValPairs:
    """The pairs of a validation set, read when asked for. What a degradation leaves to chance depends on the image's name alone."""

    def __init__(
        self, files: Sequence[PairFiles], scale: int, degradation: Degradation | None = None, *, grey: bool = False
    ) -> None:
        self.pairs = Pairs(files, scale, degradation, grey=grey)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ValPair:
        lq, gt = self.pairs[index]
        files, degradation = self.pairs.files[index], self.pairs.degradation
        made = to_float(lq)
        if files.lq is None:
            margin = degradation.margin()
            wide = window(lq.numpy(), -margin, -margin, lq.shape[1] + 2 * margin, lq.shape[2] + 2 * margin)
            made = degradation.degrade(as_sample(wide), generator(f"evaluate {files.name}"))
        return ValPair(files.name, made, to_float(gt))

    def __iter__(self) -> Iterator[ValPair]:
        return (self[index] for index in range(len(self)))


def open_train_set(data: Data, scale: int, patch: int) -> TrainSet:
    """The images of `data.train` in patches of `patch` pixels; InputError for unpaired files and images that are too small."""
    return TrainSet(complete(*train_files(data)), scale, patch, data.batch, data.degradation, grey=data.grey)


def open_val_set(entry: ValSet, scale: int, data: Data | None = None) -> ValPairs:
    """The pairs of a validation set; InputError for unpaired files.

    Inputs are made by its own degradation, by that of `data`, or by bicubic downscaling.
    """
    degradation = entry.made_by(data.degradation if data else None)
    return ValPairs(complete(*val_files(entry)), scale, degradation, grey=data is not None and data.grey)


def train_problems(data: Data, scale: int, patch: int) -> list[str]:
    """Everything wrong with the training images; reads them all."""
    pairs, problems = train_files(data)
    return problems + image_problems(pairs, scale, least_for_training(patch))


def val_problems(entry: ValSet, scale: int, protocol: Protocol, *, headers_only: bool = False) -> list[str]:
    """Everything wrong with the images of a validation set; reads them all, or their headers alone."""
    pairs, problems = val_files(entry)
    least = LeastSide(protocol.least_side(scale), f"the least that protocol {protocol.name} measures; remove it")
    return problems + image_problems(pairs, scale, least, headers_only=headers_only)


def train_files(data: Data) -> tuple[list[PairFiles], list[str]]:
    if isinstance(data.train, str):
        return match_photos(TRAIN_PHOTOS)
    matched = [match_folders(*folders(images), exclude=images.exclude) for images in data.train_folders]
    return [pair for pairs, _ in matched for pair in pairs], [text for _, problems in matched for text in problems]


def val_files(entry: ValSet) -> tuple[list[PairFiles], list[str]]:
    if entry.gt != "photos":
        return match_folders(*folders(entry))
    if entry.lq is not None:
        return [], [
            f"{entry.lq}: holds no inputs of the embedded photographs: give their folder as gt, or leave lq out"
        ]
    return match_photos(HELD_OUT_PHOTOS)


def folders(images: TrainFolders | ValSet) -> tuple[Path, Path | None, str]:
    return Path(images.gt), None if images.lq is None else Path(images.lq), images.lq_template


def complete(pairs: list[PairFiles], problems: list[str]) -> list[PairFiles]:
    if problems:
        raise InputError(problems)
    return pairs


def least_for_training(patch: int) -> LeastSide:
    return LeastSide(patch, "the patch; remove it, or choose a smaller data.patch")
