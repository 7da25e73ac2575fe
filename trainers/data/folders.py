"""Folders of images: which ground truth belongs to which input, and everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainers.data.images import EXTENSIONS, read_image
from trainers.errors import InputError


@dataclass(frozen=True)
class PairFiles:
    """The files of one ground truth and its degraded input."""

    name: str
    """File name of the ground truth without its extension."""
    gt: Path
    """The ground truth."""
    lq: Path | None
    """The input. None: the input is made from the ground truth by bicubic downscaling."""


def match_folders(gt: Path, lq: Path | None, lq_template: str = "{}") -> tuple[list[PairFiles], list[str]]:
    """The pairs in two folders, sorted by name, and what is wrong with the other files.

    In `lq_template`, {} stands for the ground truth's name.
    """
    if lq is not None and "{}" not in lq_template:
        return [], [f"lq_template {lq_template!r} has no {{}} where the ground truth's name goes: write e.g. '{{}}x2'"]
    ground_truths, problems = list_images(gt)
    if lq is None:
        return [PairFiles(name, path, None) for name, path in ground_truths.items()], problems
    inputs, input_problems = list_images(lq)
    problems += input_problems
    if not (ground_truths and inputs):
        return [], problems
    partner = {name: lq_template.replace("{}", name) for name in ground_truths}
    hint = f"or set lq_template (now {lq_template!r})"
    problems += [
        f"{path}: has no input {partner[name]}.* in {lq}; add it, remove this one, {hint}"
        for name, path in ground_truths.items()
        if partner[name] not in inputs
    ]
    taken = set(partner.values())
    problems += [
        f"{path}: belongs to no ground truth in {gt}; remove it, {hint}"
        for name, path in inputs.items()
        if name not in taken
    ]
    pairs = [PairFiles(name, path, inputs.get(partner[name])) for name, path in ground_truths.items()]
    return [pair for pair in pairs if pair.lq], problems


def list_images(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The images that lie in this folder (not below it): file name without extension -> path, sorted; and its problems."""
    if not folder.is_dir():
        return {}, [f"{folder}: no such folder"]
    images: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXTENSIONS or not path.is_file():
            continue
        if path.stem in images:
            problems.append(
                f"{path}: the name {path.stem} is taken by {images[path.stem].name}; rename or remove one of them"
            )
        images[path.stem] = path
    if not images:
        problems.append(f"{folder}: holds no images; needed are files ending in {', '.join(EXTENSIONS)}")
    return images, problems


class LeastSide(NamedTuple):
    """The smallest height and width that a ground truth may have."""

    pixels: int
    reason: str


def image_problems(pairs: Sequence[PairFiles], scale: int, least: LeastSide) -> list[str]:
    """Everything wrong with the images themselves: decodes them all, on every core.

    Damaged or unsupported files, inputs that are not 1/scale of their ground truth, ground truths that are too small.
    """
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        found = pool.map(lambda pair: problems_of_pair(pair, scale, least), pairs)
        return [problem for problems in found for problem in problems]


def problems_of_pair(pair: PairFiles, scale: int, least: LeastSide) -> list[str]:
    problems: list[str] = []
    sizes: dict[Path | None, tuple[int, ...]] = {}
    for path in (pair.gt, pair.lq):
        if path is not None:
            try:
                sizes[path] = tuple(read_image(path).shape[1:])
            except InputError as error:
                problems += error.problems
    if pair.gt in sizes:
        problems += too_small(pair.gt, sizes[pair.gt], least)
    if pair.gt in sizes and pair.lq in sizes:
        problems += wrong_scale(pair, sizes[pair.gt], sizes[pair.lq], scale)
    return problems


def too_small(path: Path, size: tuple[int, ...], least: LeastSide) -> list[str]:
    if min(size) >= least.pixels:
        return []
    return [f"{path}: {size[1]}x{size[0]} is smaller than {least.pixels}x{least.pixels}, {least.reason}"]


def wrong_scale(pair: PairFiles, gt: tuple[int, ...], lq: tuple[int, ...], scale: int) -> list[str]:
    """A ground truth may have up to scale - 1 rows and columns more than its input covers; they are cropped."""
    needed = tuple(side // scale for side in gt)
    if lq == needed:
        return []
    return [
        f"{pair.lq}: {lq[1]}x{lq[0]}, but 1/{scale} of {pair.gt.name} ({gt[1]}x{gt[0]}) is {needed[1]}x{needed[0]}; "
        "check the scale and that the two folders belong together"
    ]
