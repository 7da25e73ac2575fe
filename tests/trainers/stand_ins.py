"""Fixed random images and features, in float64, in place of a batch and of networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainers.methods import METHODS, Batch, Features, Method, build
from trainers.methods.base import Network

B, TAPS = 4, ("t1", "t2", "t3")
CHANNELS, SIDE, KEY = 5, 3, (3, 17)


def images(seed: int, side: int = 6) -> Tensor:
    return torch.rand(B, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taps(seed: int, channels: int = CHANNELS, side: int = SIDE, names: tuple[str, ...] = TAPS) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, channels, side, side, dtype=torch.float64, generator=generator) for name in names}


def network(output: Tensor, features: Features, rows: slice = slice(None)) -> Network:
    return lambda x: (output[rows], {name: feature[rows] for name, feature in features.items()})


def make(name: str, **options: object) -> Method:
    """The method of these options, in float64."""
    return build(METHODS[name][0].model_validate({"name": name, **options})).double()


def losses_of(
    method: Method,
    batch: Batch,
    student: Network,
    teachers: Mapping[str, Network],
) -> dict[str, Tensor]:
    """What the trainer does with one batch: share, then the losses."""
    if method.requirements().batch_coupled:
        with torch.no_grad():
            batch.shared = method.share(batch, teachers)
    losses: dict[str, Tensor] = method(batch, student, teachers)
    assert tuple(losses) == method.losses
    return losses
