"""Folders of images: which ground truth belongs to which input, and everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import NamedTuple

from trainers.data.images import EXTENSIONS, read_image, stored_size
from trainers.errors import InputError


@dataclass(frozen=True)
class PairFiles:
    """The files of one ground truth and its degraded input."""

    name: str
    """File name of the ground truth without its extension; of the input, where a ground truth has several."""
    gt: Path
    """The ground truth."""
    lq: Path | None
    """The input. None: a degradation makes it from the ground truth."""


def match_folders(
    gt: Path, lq: Path | None, lq_template: str = "{}", exclude: Sequence[str] = ()
) -> tuple[list[PairFiles], list[str]]:
    """The pairs in two folders, sorted by name, and what is wrong with the other files; or one pair, given by its files.

    In `lq_template`, {} stands for the ground truth's name and * for anything: {}_* finds several inputs of one ground truth.
    `exclude` holds names of ground truths that are left out, with their inputs.
    """
    if lq is not None and "{}" not in lq_template:
        return [], [f"lq_template {lq_template!r} has no {{}} where the ground truth's name goes: write e.g. '{{}}x2'"]
    if gt.is_file():
        wrong = [] if lq is None or lq.is_file() else [f"{lq}: is no file, but {gt} is one; give the file of its input"]
        return [PairFiles(gt.stem, gt, lq)], wrong
    ground_truths, problems = list_images(gt)
    problems += [
        f"exclude: {name} is the name of no image in {gt}; remove it from the list"
        for name in exclude
        if name not in ground_truths and ground_truths
    ]
    if ground_truths and ground_truths.keys() <= set(exclude):
        problems.append(f"exclude: leaves no image of {gt}; remove names from the list, or the folder")
    if lq is None:
        return [PairFiles(name, path, None) for name, path in ground_truths.items() if name not in exclude], problems
    inputs, input_problems = list_images(lq)
    problems += input_problems
    if not (ground_truths and inputs):
        return [], problems
    owners = {name: owner_of(name, ground_truths, lq_template) for name in inputs}
    partnered = set(owners.values())
    hint = f"or set lq_template (now {lq_template!r})"
    problems += [
        f"{path}: has no input {lq_template.replace('{}', name)}.* in {lq}; add it, remove this one, {hint}"
        for name, path in ground_truths.items()
        if name not in partnered and name not in exclude
    ]
    problems += [
        f"{path}: belongs to no ground truth in {gt}; remove it, {hint}"
        for name, path in inputs.items()
        if owners[name] is None
    ]
    pairs = [
        PairFiles(name if "*" in lq_template else owner, ground_truths[owner], inputs[name])
        for name, owner in owners.items()
        if owner is not None and owner not in exclude
    ]
    return sorted(pairs, key=lambda pair: (pair.gt, pair.name)), problems


def owner_of(name: str, ground_truths: Collection[str], lq_template: str) -> str | None:
    """The ground truth to which the input `name` belongs; the longest name where several fit."""
    before, after = lq_template.split("{}", 1)
    if "*" not in lq_template:
        owner = name[len(before) : len(name) - len(after)]
        return owner if owner in ground_truths and before + owner + after == name else None
    starts = range(len(name)) if "*" in before else [len(before)]
    parts = {name[start:stop] for start in starts for stop in range(start + 1, len(name) + 1)}
    fitting = [
        part for part in parts if part in ground_truths and fnmatchcase(name, lq_template.replace("{}", escape(part)))
    ]
    return max(fitting, key=len, default=None)


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


def image_problems(
    pairs: Sequence[PairFiles], scale: int, least: LeastSide, *, headers_only: bool = False
) -> list[str]:
    """Everything wrong with the images themselves: decodes them all, on every core, or reads their headers alone.

    Damaged or unsupported files, inputs that are not 1/scale of their ground truth, ground truths that are too small.
    """
    size_of = stored_size if headers_only else decoded_size
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        found = pool.map(lambda pair: problems_of_pair(pair, scale, least, size_of), pairs)
        return [problem for problems in found for problem in problems]


def problems_of_pair(
    pair: PairFiles, scale: int, least: LeastSide, size_of: Callable[[Path], tuple[int, int]]
) -> list[str]:
    problems: list[str] = []
    sizes: dict[Path | None, tuple[int, int]] = {}
    for path in (pair.gt, pair.lq):
        if path is not None:
            try:
                sizes[path] = size_of(path)
            except InputError as error:
                problems += error.problems
    if pair.gt in sizes:
        problems += too_small(pair.gt, sizes[pair.gt], least)
    if pair.gt in sizes and pair.lq in sizes:
        height, width = sizes[pair.gt]
        wrong = wrong_scale(pair, (height, width), sizes[pair.lq], scale)
        # A header does not tell an EXIF rotation, which one of the two may have.
        if size_of is not stored_size or wrong_scale(pair, (width, height), sizes[pair.lq], scale):
            problems += wrong
    return problems


def decoded_size(path: Path) -> tuple[int, int]:
    """(height, width); InputError for what cannot be read."""
    height, width = read_image(path).shape[1:]
    return height, width


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
