"""Validation during a run, and its results at the end: result.json, images, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainers import architectures, networks
from trainers.architectures import Network
from trainers.config import Config
from trainers.data.images import write_png
from trainers.data.sets import ValPair, open_val_set, val_problems
from trainers.errors import InputError
from trainers.evaluate import baseline, count_macs, count_parameters, evaluate
from trainers.files import replace_file
from trainers.json_text import to_json
from trainers.memory import memory_given_back
from trainers.metrics import PROTOCOLS
from trainers.position import Position
from trainers.run_folder import RunFolder, environment

MACS_OUTPUT = (720, 1280)  # height and width of the restored image for which MACs are counted


class Validation:
    """The validation sets of a config; called with a network, it measures it on each.

    Raises:
        InputError: images that cannot be opened or measured, by their headers: found before training, not after it.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        protocol, sets = PROTOCOLS[config.val.protocol], config.data.val
        found = {entry.name: val_problems(entry, config.scale, protocol, headers_only=True) for entry in sets}
        if any(found.values()):
            raise InputError([f"data.val {name}: {text}" for name, problems in found.items() for text in problems])
        self.config = config
        self.device = device
        self.sets = {entry.name: open_val_set(entry, config.scale, config.data) for entry in sets}

    @property
    def first(self) -> str:
        """The set by which the best checkpoint is chosen."""
        return next(iter(self.sets))

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """Set name -> what its numbers depend on besides the network: with another one they cannot be compared."""
        data, found = self.config.data, {}
        for entry in data.val:
            made = entry.made_by(data.degradation)
            found[entry.name] = entry.model_dump(mode="json") | {
                "degradation": made and made.model_dump(mode="json"),
                "grey": data.grey,
                "protocol": self.config.val.protocol,
            }
        return found

    def __call__(self, network: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
        """[{"set", "protocol", "psnr", "ssim", "per_image"}], in the order of the config."""
        protocol = self.config.val.protocol
        with memory_given_back():
            return [
                {
                    "set": name,
                    "protocol": protocol,
                    **evaluate(network, pairs, PROTOCOLS[protocol], self.config.scale, self.device),
                }
                for name, pairs in self.sets.items()
            ]

    def scores(self, network: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Any]]:
        """Set name -> {"psnr", "ssim", "per_image"}."""
        return {line["set"]: {key: line[key] for key in ("psnr", "ssim", "per_image")} for line in self(network)}


def write_results(validation: Validation, student: nn.Module, folder: RunFolder, position: Position) -> None:
    """Measures the baseline, student and teacher; writes result.json, images/ and report.html."""
    from trainers.report import write_report

    run = validation.config
    student = networks.any_size(run.student, student, run.val.tile)
    restorers: dict[str, Callable[[Tensor], Tensor]] = dict([baseline(run.scale)]) | {"student": student}
    if run.teacher is not None:
        built = networks.build_network(run.teacher, "teacher").eval().requires_grad_(False)
        # In the layout of training: 1,310 MiB for 1,519 with a thin Restormer on a CPU.
        built = networks.placed(built, validation.device, run.train.channels_last)
        restorers["teacher"] = teacher = networks.any_size(run.teacher, built, run.val.tile)
    scores = {who: validation.scores(restorer) for who, restorer in restorers.items()}
    for name, pairs in validation.sets.items():
        for index in range(min(run.val.save_images, len(pairs))):
            save_images(validation, folder, name, pairs[index], restorers)
    result = {
        "name": run.name,
        "status": "done",
        "task": run.task,
        "scale": run.scale,
        "method": run.method.name,
        "steps": position.step,
        "seconds": position.seconds,
        "seed": run.train.seed,
        "protocol": run.val.protocol,
        "protocol_text": PROTOCOLS[run.val.protocol].describe(),
        "batch": run.data.batch,
        "patch": run.data.patch,
        "student": description(run.student, student, run.scale),
        "teacher": None
        if run.teacher is None
        else description(run.teacher, teacher, run.scale) | {"weights": run.teacher.weights},
        "macs_for": f"{MACS_OUTPUT[1]}x{MACS_OUTPUT[0]} output",
        "sets": {name: {who: scores[who][name] for who in restorers} for name in validation.sets},
        "best": position.best,
        "environment": environment(),
    }
    replace_file(folder.path / "result.json", (to_json(result, indent=1) + "\n").encode())
    write_report(folder.path)


@torch.no_grad()
def save_images(
    validation: Validation,
    folder: RunFolder,
    set_name: str,
    pair: ValPair,
    restorers: dict[str, Callable[[Tensor], Tensor]],
) -> None:
    """images/<set>/<image>_{lq,<baseline>,student,teacher,gt}.png."""
    target = folder.path / "images" / set_name
    target.mkdir(parents=True, exist_ok=True)
    write_png(target / f"{pair.name}_lq.png", pair.lq)
    write_png(target / f"{pair.name}_gt.png", pair.gt)
    for who, restorer in restorers.items():
        restored = restorer(pair.lq[None].to(validation.device))[0].float().cpu()
        write_png(target / f"{pair.name}_{who}.png", restored)


def description(network: Network, built: nn.Module, scale: int) -> dict[str, Any]:
    """{"arch", "options", "params", "macs"} of a network."""
    height, width = (size // scale for size in MACS_OUTPUT)
    options = architectures.options(network)
    channels = architectures.entry(network).image_channels(options)
    return {
        "arch": network.arch,
        "options": options.model_dump(mode="json"),
        "params": count_parameters(built),
        "macs": count_macs(built, (1, channels, height, width)),
    }
