"""What `kdtrain eval` and `kdtrain restore` are given: a run, a checkpoint or weights, as a network ready to restore pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint import Checkpoints, step_of
from trainers.config import Config
from trainers.config_file import load_config
from trainers.errors import InputError
from trainers.inference import Around, SelfEnsemble
from trainers.models import ModelEntry
from trainers.networks import AnySize, network_of_weights
from trainers.pretrained import noted, read_weights


@dataclass(frozen=True)
class Source:
    """A network with its weights."""

    weights: Path
    """Where they were read from."""
    entry: ModelEntry[Any]
    """Which network it is."""
    options: Any
    """Of its constructor."""
    network: AnySize
    """In eval mode on the best device there is, for images of any size."""
    config: Config | None
    """The config of its run; None for weights that are in no run folder."""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def grey(self) -> bool:
        """Whether it restores grey images."""
        return self.entry.image_channels(self.options) == 1

    @property
    def step(self) -> int | None:
        """Where its run stands; None for weights that are in no run folder."""
        return None if self.config is None else step_of(self.weights)

    def restorer(self, *, tile: int | None, ensemble: bool) -> AnySize | Around:
        """The network, tile by tile and averaged over orientations as asked.

        Raises:
            InputError: a tile that does not fit the network.
        """
        restorer: AnySize | Around = self.network
        if tile is not None:
            try:
                restorer = self.network.in_tiles(tile)
            except ValueError as error:
                raise InputError(f"--tile {tile}: {error}") from None
        return SelfEnsemble(restorer).eval() if ensemble else restorer.eval()


def open_source(path: Path) -> Source:
    """The network of a run folder (its last checkpoint), a checkpoint folder or a file of weights.

    Raises:
        InputError: there are no weights, or no network of ours has them.
    """
    weights, config = path, None
    if (path / "config.yaml").is_file():
        config = load_config(path / "config.yaml")
        last = Checkpoints(path / "checkpoints", keep=1).last()
        if last is None:
            raise InputError(f"{path} has no checkpoint yet")
        weights = last
    entry, options, network = network_of_weights(read_weights(str(weights)), noted(str(weights)), str(weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Source(weights, entry, options, AnySize(network, entry, options).eval().to(device), config)
