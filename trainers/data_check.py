"""`kdtrain data check`: what downloaded folders hold, which belong together, and everything that is wrong with their images."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.table import Table

from trainers.data.folders import LeastSide, PairFiles, list_images, owner_of, too_small, wrong_scale
from trainers.data.images import EXTENSIONS, read_image
from trainers.errors import InputError
from trainers.terminal import plain_console

# Words of folder names, as the field's data sets have them (GoPro, REDS, SIDD, RESIDE, Rain13K, DIV2K, Set5 ...).
TRUTHS = {"gt", "hr", "sharp", "target", "targets", "clean", "clear", "groundtruth", "norain", "original"}
INPUTS = {"lq", "lr", "input", "inputs", "blur", "blurry", "blurred", "hazy", "haze", "noisy", "rain", "rainy", "degraded"}  # fmt: skip
VARIANTS = {"gamma", "bicubic", "unknown", "mild", "difficult", "wild", "x2", "x3", "x4", "x8"}  # which inputs
TEMPLATES = ("{}", "{}x2", "{}x3", "{}x4", "{}x8", "{}_*", "{}-*")
PROBLEMS = ("unpaired", "wrong scale", "corrupt", "too small", "names")
NOTES = ("N:1", "modcrop")
EXAMPLES = 3

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class ImageFolder:
    """A folder that holds images itself."""

    path: Path
    role: Literal["truths", "inputs", "images"]
    """What the last telling word of its path says."""
    variant: frozenset[str]
    """Words that tell apart several inputs of the same ground truths."""
    place: tuple[str, ...]
    """Its path below the root without those words: the same for folders that belong together."""


@dataclass
class Checked:
    """One folder, or an input folder with the folder of its ground truths."""

    gt: Path | None
    lq: Path | None
    template: str = "{}"
    pairs: list[PairFiles] = field(default_factory=list)
    scale: int | None = None
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Kind of problem or note -> messages."""

    @property
    def faulty(self) -> bool:
        return any(self.found.get(kind) for kind in PROBLEMS)


def check_data(paths: Sequence[Path], patch: int, scale: int | None = None) -> list[Checked]:
    """Everything in these folders and below them: decodes every image once, on every core.

    Args:
        patch: least height and width of a ground truth.
        scale: what ground truths are larger by; None takes what most pairs of a folder have.

    Raises:
        InputError: a path is no folder, or there are no images.
    """
    missing = [f"{path}: no such folder" for path in paths if not path.is_dir()]
    if missing:
        raise InputError(missing)
    root = Path(os.path.commonpath([path.resolve() for path in paths]))
    folders = [image_folder(path, root) for path in image_folders(paths)]
    if not folders:
        raise InputError([f"{path}: no images in it or below it ({', '.join(EXTENSIONS)})" for path in paths])
    checked = match(folders)
    sizes = decode({path for part in checked for pair in part.pairs for path in (pair.gt, pair.lq) if path is not None})
    for part in checked:
        judge(part, sizes, patch, scale)
    return checked


def image_folders(paths: Iterable[Path]) -> list[Path]:
    """The folders that hold images, at and below the paths."""
    found = {
        Path(place)
        for path in paths
        for place, _, files in os.walk(path.resolve())
        if any(Path(name).suffix.lower() in EXTENSIONS for name in files)
    }
    return sorted(found)


def image_folder(path: Path, root: Path) -> ImageFolder:
    role: Literal["truths", "inputs", "images"] = "images"
    place, variant = [], set()
    for part in path.relative_to(root).parts:
        words = [word for word in re.split(r"[^a-z0-9]+", part.lower()) if word]
        for word in words:
            role = "truths" if word in TRUTHS else "inputs" if word in INPUTS else role
        variant |= set(words) & (INPUTS | VARIANTS)
        rest = " ".join(word for word in words if word not in TRUTHS | INPUTS | VARIANTS)
        place += [rest] if rest else []
    return ImageFolder(path, role, frozenset(variant), tuple(place))


def match(folders: Sequence[ImageFolder]) -> list[Checked]:
    """Input folders with their ground truths, then what is left: sets of images alone."""
    listed = {folder.path: list_images(folder.path) for folder in folders}
    truths = [folder for folder in folders if folder.role == "truths"]
    checked, partnered = [], set()
    for folder in folders:
        if folder.role == "truths":
            continue
        part = paired(folder, truths, {path: images for path, (images, _) in listed.items()})
        if part.gt is not None:
            partnered.add(part.gt)
        checked.append(part)
    for folder in truths:
        if folder.path not in partnered:
            checked.append(alone(folder.path, listed[folder.path][0]))
    for part in checked:
        part.found["names"] += [text for path in (part.gt, part.lq) if path is not None for text in listed[path][1]]
    return checked


def alone(path: Path, images: Mapping[str, Path]) -> Checked:
    """A set of images without inputs."""
    part = Checked(path, None, pairs=[PairFiles(name, image, None) for name, image in images.items()])
    words = [set(re.split(r"[^a-z0-9]+", name.lower())) for name in images]
    if any(found & TRUTHS for found in words) and all(found & (TRUTHS | INPUTS) for found in words):
        part.found["names"].append(
            f"{path}: holds ground truths and inputs; move them to two folders, with the same names"
        )
    return part


def paired(folder: ImageFolder, truths: Sequence[ImageFolder], listed: Mapping[Path, Mapping[str, Path]]) -> Checked:
    """An input folder with the ground truths of its place to whose names most of its own fit."""
    inputs, best = listed[folder.path], Checked(None, folder.path)
    near = [truth for truth in truths if truth.place == folder.place[: len(truth.place)]]
    near.sort(key=lambda truth: (len(truth.place), len(truth.variant & folder.variant)), reverse=True)
    owners: dict[str, str | None] = dict.fromkeys(inputs)
    for truth in near:
        for template in TEMPLATES:
            tried = {name: owner_of(name, listed[truth.path], template) for name in inputs}
            if sum(map(bool, tried.values())) > sum(map(bool, owners.values())):
                best, owners = Checked(truth.path, folder.path, template), tried
    if best.gt is None and folder.role == "images":
        return alone(folder.path, inputs)
    if best.gt is None and near:
        best.gt = near[0].path
    ground_truths = listed[best.gt] if best.gt else {}
    best.pairs = [PairFiles(name, ground_truths[owner], inputs[name]) for name, owner in owners.items() if owner]
    lonely = [path for name, path in ground_truths.items() if name not in set(owners.values())]
    best.found["unpaired"] += [f"{path}: has no input in {folder.path}" for path in lonely]
    whose = f"belongs to no ground truth in {best.gt}" if best.gt else "has no folder of ground truths"
    best.found["unpaired"] += [f"{inputs[name]}: {whose}" for name, owner in owners.items() if owner is None]
    counts = Counter(pair.gt for pair in best.pairs)
    best.found["N:1"] += [f"{path}: has {count} inputs" for path, count in counts.items() if count > 1]
    return best


def decode(paths: Iterable[Path]) -> dict[Path, Size | InputError]:
    """The size of every image, or what is wrong with it."""

    def size(path: Path) -> Size | InputError:
        try:
            height, width = read_image(path).shape[1:]
        except InputError as error:
            return error
        return height, width

    ordered = sorted(paths)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        return dict(zip(ordered, pool.map(size, ordered), strict=True))


def judge(part: Checked, sizes: Mapping[Path, Size | InputError], patch: int, scale: int | None) -> None:
    """Adds what decoding showed: corrupt files, small ground truths, sizes that are not one scale, rows that will be cropped."""
    files = dict.fromkeys(path for pair in part.pairs for path in (pair.gt, pair.lq) if path is not None)
    good = {path: size for path in files if not isinstance(size := sizes[path], InputError)}
    for path in files:
        if isinstance(error := sizes[path], InputError):
            part.found["corrupt"] += error.problems
    whole = [(pair, good[pair.gt], good[pair.lq]) for pair in part.pairs if pair.gt in good and pair.lq in good]
    votes = Counter(max(1, round(gt[0] / lq[0])) for _, gt, lq in whole)
    part.scale = scale or (votes.most_common(1)[0][0] if votes else None)
    least = LeastSide(patch, "the patch: remove it, or give a smaller --patch")
    truths = {pair.gt: good[pair.gt] for pair in part.pairs if pair.gt in good}
    part.found["too small"] += [text for path, size in truths.items() for text in too_small(path, size, least)]
    if part.scale is None:
        return
    part.found["wrong scale"] += [text for pair, gt, lq in whole for text in wrong_scale(pair, gt, lq, part.scale)]
    part.found["modcrop"] += [
        f"{path}: {size[1]}x{size[0]} is no multiple of {part.scale}; the rest at the bottom and right is cropped"
        for path, size in truths.items()
        if any(side % part.scale for side in size)
    ]


def data_check_command(paths: Sequence[Path], patch: int, scale: int | None) -> bool:
    """Checks and prints; whether nothing is wrong."""
    checked, console = check_data(paths, patch, scale), plain_console()
    console.print(_table(checked), highlight=False)
    for kind in (*PROBLEMS, *NOTES):
        texts = list(dict.fromkeys(text for part in checked for text in part.found[kind]))
        for text in texts[:EXAMPLES]:
            console.print(f"{kind}: {text}", highlight=False, soft_wrap=True)
        if len(texts) > EXAMPLES:
            console.print(f"{kind}: and {len(texts) - EXAMPLES} more", highlight=False)
    for line in config_lines(checked):
        console.print(line, highlight=False, soft_wrap=True)
    return not any(part.faulty for part in checked)


def _table(checked: Sequence[Checked]) -> Table:
    """Narrow enough for a terminal of 80 columns: folders below the one that holds all of them, and what was found in one column."""
    folders = {path for part in checked for path in (part.gt, part.lq) if path is not None}
    base = Path(os.path.commonpath([os.path.abspath(path.parent) for path in folders]))
    table = Table(title=f"in {base}", title_style="", title_justify="left")
    for name in ("ground truths", "inputs"):
        table.add_column(name, overflow="fold")
    for name in ("pairs", "scale"):
        table.add_column(name, justify="right")
    table.add_column("found", overflow="fold")
    for part in checked:
        names = ["" if path is None else os.path.relpath(path, base) for path in (part.gt, part.lq)]
        count = f"{len(part.pairs)}" if part.lq else f"{len(part.pairs)} images"
        found = ", ".join(f"{len(part.found[kind])} {kind}" for kind in (*PROBLEMS, *NOTES) if part.found[kind])
        table.add_row(*names, count, f"x{part.scale}" if part.scale else "", found)
    return table


def config_lines(checked: Sequence[Checked]) -> Iterator[str]:
    """`data.train` of a config for each kind of pairs that was found whole."""
    kinds: dict[tuple[int | None, str, str], list[Checked]] = defaultdict(list)
    for part in checked:
        if part.pairs and part.gt is not None and not part.faulty:
            kinds[part.scale, part.template, part.lq.name if part.lq else ""].append(part)
    for (scale, template, name), parts in kinds.items():
        yield f"data.train for {name or 'images alone'}" + (f", scale {scale}" if scale else "") + ":"
        for part in parts:
            # JSON strings are YAML strings, whatever is in a path.
            keys = {"gt": str(part.gt)} | ({"lq": str(part.lq)} if part.lq else {})
            keys |= {"lq_template": template} if template != "{}" else {}
            yield "  - {" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in keys.items()) + "}"
