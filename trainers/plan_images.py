"""What images add to the memory of a training process: those that validation restores, and those that are kept decoded.

Where it fits, a process of its own makes a training step and restores an image as large as the largest of the validation sets, by the
student and by the teacher, which a run measures at its end. Beyond, the bytes are counted on fake tensors.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainers.architectures import Network
from trainers.config import Config
from trainers.data.folders import PairFiles
from trainers.data.images import stored_size
from trainers.data.pairs import CACHE_BYTES
from trainers.data.sets import train_files, val_files
from trainers.errors import InputError
from trainers.inference import Restorer
from trainers.live_bytes import LiveBytes
from trainers.memory import memory_given_back
from trainers.metrics import PROTOCOLS, psnr, ssim
from trainers.networks import any_size
from trainers.plan import Planner, Point, free_memory, given, in_child, process_peak
from trainers.step import TrainStep

TILES = (512, 384, 256, 192, 128, 96, 64)  # sides to propose for val.tile


@dataclass(frozen=True)
class Validated:
    """What validation takes the process to."""

    image: str
    """The largest: <set>/<image>."""
    size: tuple[int, int]
    """Its height and width."""
    tile: int | None
    """val.tile."""
    decoded: int
    """Bytes of the images that the process keeps decoded, of training and validation; part of the peak."""
    peak: int
    """Bytes of the process at its highest."""
    measured: bool


def plan_validation(planner: Planner, point: Point) -> Validated:
    """After a step at `point`: measured where it fits and takes no longer than allowed, else simulated."""
    config = planner.config
    image, size = largest_image(config)
    kept = decoded(config)
    peak, seconds = simulated(planner, point, size, config.val.tile)
    found = Validated(image, size, config.val.tile, kept, peak + kept, measured=False)
    if found.peak > min(planner.memory, free_memory()) or seconds > planner.longest:
        return found
    peak = in_child(__name__, config, point, f"validation of an image of {size[1]} x {size[0]}", size=size)
    return dataclasses.replace(found, peak=peak + kept, measured=True)


def tile_that_fits(planner: Planner, point: Point, refused: Validated) -> Validated | None:
    """The same with the largest tile that fits in the memory, simulated; None if none does."""
    for tile in TILES:
        try:
            peak, _ = simulated(planner, point, refused.size, tile)
        except ValueError:  # no multiple of what the network needs
            continue
        if peak + refused.decoded <= planner.memory:
            return dataclasses.replace(refused, tile=tile, peak=peak + refused.decoded, measured=False)
    return None


def simulated(planner: Planner, point: Point, size: tuple[int, int], tile: int | None) -> tuple[int, float]:
    """Bytes of the process that restores an image of this size after a step, as counted and learned, and the seconds that it takes."""
    step = planner.predict(point)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        restore(planner.config, planner.train_step(point.recompute), size, tile)
    # The step's own storages are given back before. But restoring leaves holes and needs buffers for convolutions as well, which no count
    # sees: with the step's storages in their place, five cases came out 3 % too low to 15 % too high.
    before = step.peak - step.costs.peak + step.costs.small
    return before + live.peak, planner.seconds_of("student", live.work)


@torch.no_grad()
def restore(config: Config, train_step: TrainStep, size: tuple[int, int], tile: int | None) -> None:
    """Restores and measures a blank image by each network of a run."""
    protocol, channels = PROTOCOLS[config.val.protocol], 1 if config.data.grey else 3
    device = next(train_step.student.parameters()).device
    lq = torch.zeros(1, channels, *(side // config.scale for side in size), device=device)
    gt = torch.zeros(channels, *size, device=device)
    for restorer in _restorers(config, train_step, tile):
        restored: Tensor = restorer(lq)[0]
        compared = protocol.prepare(restored, config.scale), protocol.prepare(gt, config.scale)
        psnr(*compared)
        ssim(*compared)


def _restorers(config: Config, train_step: TrainStep, tile: int | None) -> list[Restorer]:
    networks: list[tuple[Network, nn.Module]] = [(config.student, train_step.student)]
    if config.teacher is not None and train_step.tapped_teachers:
        networks.append((config.teacher, next(iter(train_step.tapped_teachers.values())).network))
    return [any_size(described, network, tile) for described, network in networks]


def largest_image(config: Config) -> tuple[str, tuple[int, int]]:
    """Name and (height, width) of the largest ground truth of all validation sets, by the files' headers."""
    found = [
        (stored_size(pair.gt), f"{entry.name}/{pair.name}") for entry in config.data.val for pair in val_files(entry)[0]
    ]
    if not found:
        raise InputError("data.val: its folders hold no images: kdtrain data check says what is wrong")
    (height, width), name = max(found, key=lambda image: image[0][0] * image[0][1])
    return name, (height // config.scale * config.scale, width // config.scale * config.scale)


def decoded(config: Config) -> int:
    """Bytes of the images that the process keeps, one byte a value, as far as its caches go; data workers keep training's instead."""
    kept = sum(_kept(val_files(entry)[0], config) for entry in config.data.val)
    return kept if config.data.workers else kept + _kept(train_files(config.data)[0], config)


def _kept(files: Sequence[PairFiles], config: Config) -> int:
    """Ground truths, and inputs where they are other images."""
    inputs = 1.0 if config.scale > 1 or any(pair.lq for pair in files) else 0.0
    values = sum(height * width for height, width in (stored_size(pair.gt) for pair in files))
    channels = 1 if config.data.grey else 3
    return min(CACHE_BYTES, int(channels * values * (1 + inputs / config.scale**2)))


# --- in a process of its own ---------------------------------------------------------------------------------------------------------


def _child() -> None:
    """Read a job, make its step and restore an image of its size, say what the process took."""
    job = json.load(sys.stdin)
    config, _, train_step, step = given(job)
    step()
    with memory_given_back():
        restore(config, train_step, tuple(job["size"]), config.val.tile)
    print(process_peak())


if __name__ == "__main__":
    _child()
