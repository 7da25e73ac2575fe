"""`kdtrain eval`: PSNR and SSIM of a run, a checkpoint or weights on any images."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainers.checkpoint import Checkpoints
from trainers.config import ValSet
from trainers.errors import InputError
from trainers.fields import PHOTOS
from trainers.networks import AnySize, network_of_weights
from trainers.pretrained import read_weights


def measure(source: Path, data: list[str], lq: Path | None, protocol: str) -> dict[str, Any]:
    """{"weights", "arch", "options", "protocol", "sets": {name: {"bicubic": ..., "network": ...}}}.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or a file of weights.
        data: NAME=FOLDER or FOLDER of ground truths, or photos.
        lq: folder of degraded inputs; None downscales bicubically.

    Raises:
        InputError: no weights, images or protocol there.
    """
    from trainers.data.sets import open_val_set
    from trainers.evaluate import bicubic, evaluate
    from trainers.metrics import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise InputError(f"there is no protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    weights = _weights(source)
    entry, options, network = network_of_weights(read_weights(str(weights)))
    scale = entry.scale(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = AnySize(network, entry, options).eval().to(device)
    restorers: dict[str, Callable[[Tensor], Tensor]] = {
        "bicubic": partial(bicubic, scale=scale),
        "network": network,
    }
    sets = {}
    for text in data:
        chosen = _entry(text, lq)
        pairs = open_val_set(chosen, scale)
        sets[chosen.name] = {
            who: evaluate(restorer, pairs, PROTOCOLS[protocol], scale, device) for who, restorer in restorers.items()
        }
    return {
        "weights": str(weights),
        "arch": entry.name,
        "options": options.model_dump(mode="json"),
        "protocol": protocol,
        "protocol_text": PROTOCOLS[protocol].describe(),
        "sets": sets,
    }


def print_measured(measured: dict[str, Any], *, as_json: bool) -> None:
    """A table on the terminal, or JSON."""
    if as_json:
        print(json.dumps(measured, indent=1))
        return
    options = ", ".join(f"{key} {value}" for key, value in measured["options"].items())
    console = Console()
    console.print(f"{measured['weights']}: {measured['arch']} ({options})", highlight=False, soft_wrap=True)
    console.print(measured["protocol_text"], highlight=False, soft_wrap=True)
    table = Table("set", "image", "bicubic PSNR", "PSNR", "bicubic SSIM", "SSIM")
    for name, scores in measured["sets"].items():
        bicubic, network = scores["bicubic"], scores["network"]
        rows = [(image, bicubic["per_image"][image], network["per_image"][image]) for image in network["per_image"]]
        for image, before, after in [*rows, ("mean", bicubic, network)]:
            table.add_row(
                name,
                image,
                f"{before['psnr']:.3f}",
                f"{after['psnr']:.3f}",
                f"{before['ssim']:.4f}",
                f"{after['ssim']:.4f}",
            )
    console.print(table)


def _weights(source: Path) -> Path:
    """A run folder means its last checkpoint."""
    if not (source / "config.yaml").is_file():
        return source
    last = Checkpoints(source / "checkpoints", keep=1).last()
    if last is None:
        raise InputError(f"{source} has no checkpoint yet")
    return last


def _entry(text: str, lq: Path | None) -> ValSet:
    name, equals, folder = text.partition("=")
    folder = folder if equals else text
    name = name if equals else Path(text).name
    if folder != PHOTOS and not Path(folder).is_dir():
        raise InputError(f"--data {text}: there is no folder {folder}")
    return ValSet.model_validate({"name": name, "gt": folder, "lq": None if lq is None else str(lq)})
