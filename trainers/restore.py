"""`kdtrain restore`: pictures in, restored pictures out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.data.folders import LeastSide, PairFiles, image_problems, list_images
from trainers.data.images import read_image, to_float, write_png
from trainers.errors import InputError
from trainers.sources import open_source


def restore(given: Path, out: Path, source: Path, *, tile: int | None = None, ensemble: bool = False) -> Iterator[Path]:
    """Restores a picture or every picture of a folder; yields each PNG as soon as it is written.

    Args:
        given: an image file, or a folder of them.
        out: a folder, which is made; or, for one picture, a file that ends in .png.
        source: run folder, checkpoint folder or file of weights.
        tile: side of a tile in pixels of the input; None restores pictures whole.
        ensemble: average over the eight orientations.

    Raises:
        InputError: nothing there to read, weights that fit no network, or outputs that exist already.
    """
    images = {given.stem: given} if given.is_file() else pictures(given)
    targets = {path: target(name, path, given, out) for name, path in images.items()}
    taken = {path.resolve() for path in images.values()} & {path.resolve() for path in targets.values()}
    if taken:
        raise InputError(f"{sorted(taken)[0]} would be overwritten: give another output")
    there = [path for path in targets.values() if path.exists()]
    if there:
        others = f", and {len(there) - 1} more that would be written" if there[1:] else ""
        raise InputError(f"{there[0]} exists already{others}: give another output, or remove what is there")
    opened = open_source(source)
    restorer = opened.restorer(tile=tile, ensemble=ensemble)
    problems = image_problems([PairFiles(path.stem, path, None) for path in targets], 1, LeastSide(1, "a pixel"))
    if problems:  # of any of them, before the first is restored
        raise InputError(problems)
    for path, written in targets.items():
        image = to_float(read_image(path, grey=opened.grey))[None].to(opened.device)
        with torch.inference_mode():
            restored = restorer(image)[0]
        write_png(written, restored.float().cpu())
        yield written


def pictures(folder: Path) -> dict[str, Path]:
    images, problems = list_images(folder)
    if problems:
        raise InputError(problems)
    return images


def target(name: str, path: Path, given: Path, out: Path) -> Path:
    """Where the restored picture goes."""
    return out if given.is_file() and out.suffix.lower() == ".png" else out / f"{name}.png"
