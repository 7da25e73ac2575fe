"""Loss values of every method and option on fixed random inputs: `python -m tests.trainers.golden` writes them.

A change of these numbers is a change of what users train: it is intended and in the changelog, or a bug.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.trainers.stand_ins import KEY, B, images, losses_of, make, taps
from trainers.methods import Batch

FILE = Path(__file__).parent / "golden_losses.json"
SIDE, NAMES = 16, ("enc1", "enc2", "latent", "dec1")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scratch": ("scratch", {}),
    "output": ("output", {}),
    "fitnet": ("fitnet", {}),
    "fitnet channel means": ("fitnet", {"features": "channel_mean"}),
    "at": ("at", {}),
    "fakd": ("fakd", {}),
    "fakd p=2": ("fakd", {"p": 2}),
    "rkd": ("rkd", {}),
    "rkd flat": ("rkd", {"vectors": "flat"}),
    "csd": ("csd", {}),
    "csd 2 negatives": ("csd", {"negatives": 2}),
    "dukd": ("dukd", {}),
    "facd": ("facd", {"adaptive": False}),
    "facd infonce": ("facd", {"adaptive": False, "form": "infonce"}),
    "facd l2": ("facd", {"adaptive": False, "distance": "l2"}),
    "facd cosine": ("facd", {"adaptive": False, "distance": "cosine"}),
    "facd 2 negatives": ("facd", {"adaptive": False, "negatives": 2}),
    "facd adaptive": ("facd", {}),
    "skd": ("skd", {}),
    "skd teacher query": ("skd", {"query": "teacher"}),
    "skd normalized over the query": ("skd", {"normalize": "query"}),
    "skd dot, root": ("skd", {"logits": "dot", "channel_temperature": "sqrt", "spatial_temperature": "sqrt"}),
    "skd adaptive": ("skd", {"sigma": "adaptive"}),
    "skd to the ground truth": ("skd", {"positive": "gt"}),
    "dckd": ("dckd", {}),
    "dckd released code": ("dckd", {"mapping": "released_code"}),
    "dckd label consistency": ("dckd", {"label_consistency": True}),
    "dckd blur and resize": ("dckd", {"negatives": {"blur": 1.0, "resize": 1.0}}),
    "slkd": ("slkd", {"size": 32}),
    "slkd mscn": ("slkd", {"size": 32, "natural": "mscn"}),
    "slkd features and edges": ("slkd", {"size": 32, "natural": "features", "texture": "edges"}),
}


def network(seed: int, scale: int) -> Any:
    """An affine function of the image, of some scale, with fixed taps that know how bright it is."""

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        large = x.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
        features = {
            name: tap * (0.5 + x.mean(dim=(1, 2, 3))[:, None, None, None])
            for name, tap in taps(seed, side=6, names=NAMES).items()
        }
        return large * (1 - 0.1 * seed) + 0.02 * seed * large.roll(1, 3), features

    return run


def losses(case: str) -> dict[str, float]:
    """The losses of a case."""
    name, options = CASES[case]
    scale = 1 if name in ("slkd", "dckd") else 2  # both kinds of task are covered by the others
    student, teacher = network(1, scale), network(2, scale)
    method = make(name, **options)
    torch.manual_seed(0)
    history = nn.Conv2d(3, 3, 1).double()
    nn.init.constant_(history.weight, 0.3)
    nn.init.constant_(history.bias, 0.01)
    method.prepare(history)
    teachers = dict.fromkeys(method.requirements().teachers, teacher)
    gt, lq = images(0, SIDE), images(3, SIDE // scale)
    with torch.no_grad():
        method.calibrate([(lq, gt)], teachers)
        found = losses_of(method, Batch(lq, gt, slice(0, B), key=KEY), student, teachers)
    return {loss: float(value) for loss, value in found.items()}


if __name__ == "__main__":
    FILE.write_text(json.dumps({case: losses(case) for case in CASES}, indent=1) + "\n")
