"""Makes the pictures of docs/evaluation.md: `python docs/images/make.py`.

Input, restored image and ground truth of photographs that no network was trained on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from trainers.data.degradations.base import Degradation
from trainers.data.degradations.bicubic import Bicubic
from trainers.data.degradations.blur import MotionBlur
from trainers.data.degradations.noise import Noise
from trainers.data.degradations.rain import Rain
from trainers.data.images import to_float, write_png
from trainers.data.photos import load_photo
from trainers.sources import open_source

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIDE, ENLARGED = 128, 2
# Name: degradation, scale, network, photograph, its first row and column.
PICTURES: dict[str, tuple[Degradation, int, Path, str, int, int]] = {
    "sr": (Bicubic(), 2, ROOT / "trainers/weights/edsr-x2.safetensors", "chelsea", 64, 180),
    "denoise": (Noise(sigma=25.0), 1, ROOT / "releases/restormer-denoise25.safetensors", "chelsea", 64, 180),
    "derain": (Rain(density=12.0), 1, ROOT / "releases/nafnet-derain.safetensors", "coffee", 120, 240),
    "deblur": (MotionBlur(length=11.0), 1, ROOT / "releases/nafnet-deblur.safetensors", "chelsea", 64, 180),
}


def main() -> None:
    for name, (degradation, scale, weights, photograph, top, left) in PICTURES.items():
        photo, margin = load_photo(photograph), degradation.margin()
        truth = to_float(photo[:, top : top + SIDE, left : left + SIDE])
        seen = photo[:, top - margin : top + SIDE + margin, left - margin : left + SIDE + margin]
        degraded = degradation.degrade(to_float(degradation.prepare(seen, scale)), np.random.default_rng(0))
        with torch.inference_mode():
            restored = open_source(weights).restorer(tile=None, ensemble=False)(degraded[None])[0]
        parts = [
            interpolate(t[None], size=(ENLARGED * SIDE,) * 2, mode="nearest")[0] for t in (degraded, restored, truth)
        ]
        write_png(HERE / f"{name}.png", torch.cat(parts, dim=2))


if __name__ == "__main__":
    main()
