"""Runs small enough for tests: a few generated images, networks of some hundred weights, steps of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from trainers.checkpoint import Checkpoints, read_checkpoint
from trainers.data.images import write_png
from trainers.models import find

STUDENT = {"arch": "edsr", "features": 4, "blocks": 3}
TEACHER = {"arch": "edsr", "features": 6, "blocks": 3}
TIMES = ("seconds", "steps_per_second", "data_wait")


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 48), seed: int = 0) -> Path:
    """Smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False)
        write_png(folder / f"image{index}.png", image[0].clamp(0, 1))
    return folder


def write_teacher(path: Path, seed: int = 1) -> Path:
    """Weights of a teacher, untrained."""
    torch.manual_seed(seed)
    entry = find("edsr")
    options = entry.options(scale=2, **{key: value for key, value in TEACHER.items() if key != "arch"})
    save_file(entry.build(options).state_dict(), path)
    return path


def tiny(folder: Path, method: str = "scratch", **train: Any) -> dict[str, Any]:
    """The tree of a config whose images and weights lie in `folder`; `train` goes on top of its train block."""
    if not (folder / "train").is_dir():
        write_images(folder / "train", 3)
        write_images(folder / "val", 1, seed=9)
        write_teacher(folder / "teacher.safetensors")
    quick = {
        "steps": 4,
        "lr": 1e-3,
        "log_every": 2,
        "save_every": 4,
        "share_every": 2,
        "devices": 1,
        "accelerator": "cpu",
    }
    return {
        "name": method,
        "out": str(folder / "runs"),
        "data": {"train": {"gt": "train"}, "val": [{"name": "val", "gt": "val"}], "patch": 16, "batch": 4},
        "teacher": None if method == "scratch" else TEACHER | {"weights": "teacher.safetensors"},
        "student": STUDENT,
        "method": {"name": method},
        "train": quick | train,
        "val": {"every": 100, "save_images": 1},
    }


def write_tiny(folder: Path, method: str = "scratch", **train: Any) -> Path:
    """The same as a YAML file."""
    return write_yaml(folder, tiny(folder, method, **train))


def write_yaml(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def last_state(run: Path) -> dict[str, Any]:
    """Everything in the last checkpoint but times and folders, flat: dotted name -> tensor or plain value."""
    last = Checkpoints(run / "checkpoints", keep=1).last()
    assert last is not None
    weights, state = read_checkpoint(last)
    del state["validation"]
    for times, name in ((state, "seconds"), (state["window"], "seconds"), (state["window"], "waited")):
        del times[name]
    return flat({"weights": weights, "state": state})


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if pairs is None:
        return {prefix: tree}
    return {name: value for key, inner in pairs for name, value in flat(inner, f"{prefix}.{key}").items()}


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        equal = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert equal, name
