"""The networks in releases/: opened by their weights alone, and better than their input on a photograph that they never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trainers.data.degradations.base import Degradation
from trainers.data.degradations.blur import MotionBlur
from trainers.data.degradations.noise import Noise
from trainers.data.degradations.rain import Rain
from trainers.data.images import to_float
from trainers.data.photos import load_photo
from trainers.metrics import PROTOCOLS
from trainers.networks import network_of_weights
from trainers.pretrained import read_weights

RELEASES = Path(__file__).parents[2] / "releases"
GAINS: dict[str, tuple[Degradation, str, float]] = {  # degradation, protocol, least gain in dB
    "restormer-denoise25": (Noise(sigma=25.0), "denoise-rgb", 8.0),
    "nafnet-derain": (Rain(density=12.0), "derain-y", 8.0),
    "nafnet-deblur": (MotionBlur(length=11.0), "deblur-rgb", 1.0),
}


def test_every_release_is_tested() -> None:
    assert {path.stem for path in RELEASES.glob("*.safetensors")} == set(GAINS)


@pytest.mark.parametrize("name", GAINS)
def test_releases_restore(name: str) -> None:
    degradation, protocol, gain = GAINS[name]
    entry, _, network = network_of_weights(read_weights(str(RELEASES / f"{name}.safetensors")))
    assert entry.name == yaml.safe_load((RELEASES / f"{name}.yaml").read_text())["student"]["arch"]
    margin, side = degradation.margin(), 128
    photo = load_photo("chelsea")[:, 64 - margin : 64 + side + margin, 180 - margin : 180 + side + margin]
    lq = degradation.degrade(to_float(degradation.prepare(photo, 1)), np.random.default_rng(0))
    gt = to_float(photo[:, margin : margin + side, margin : margin + side])
    with torch.inference_mode():
        restored = network.eval()(lq[None])[0]
    before, after = (PROTOCOLS[protocol].measure(image, gt, 1)["psnr"] for image in (lq, restored))
    assert after > before + gain
