"""The photographs that scikit-image's wheel carries (public domain or CC0): data that needs no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from trainers.data.folders import PairFiles
from trainers.data.images import read_image
from trainers.errors import InputError

# motorcycle's right twin is the same scene, retina and moon have no detail: left out.
FILES = {
    "astronaut": "astronaut.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "ihc": "ihc.png",
    "hubble": "hubble_deep_field.jpg",
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "camera": "camera.png",
    "coins": "coins.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
}
HELD_OUT_PHOTOS = ("chelsea", "coffee")
TRAIN_PHOTOS = tuple(name for name in FILES if name not in HELD_OUT_PHOTOS)


def photo_path(name: str) -> Path:
    """The file of a photograph inside the installed scikit-image (which is not imported)."""
    if name not in FILES:
        raise InputError(f"no embedded photograph is called {name!r}: choose from {', '.join(FILES)}")
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("the embedded photographs come with scikit-image, which is absent: pip install 'kdops[demo]'")
    path = Path(package.origin).parent / "data" / FILES[name]
    if not path.is_file():
        raise InputError(
            f"this scikit-image has no {path.name}: pip install -U 'kdops[demo]', or train on a folder of images"
        )
    return path


def load_photo(name: str) -> Tensor:
    """The photograph as uint8 (3, H, W); grey ones with three equal channels."""
    return read_image(photo_path(name))


def match_photos(names: Sequence[str]) -> tuple[list[PairFiles], list[str]]:
    """The photographs as ground truths whose inputs are made by downscaling, and what is wrong."""
    try:
        return [PairFiles(name, photo_path(name), None) for name in names], []
    except InputError as error:
        return [], error.problems
