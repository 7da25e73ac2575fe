"""What a run asks of its devices and machines, and this machine does not have: said before Fabric, torch or a run that waits says it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from trainers.config import Train

AVAILABLE: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}


def device_problems(train: Train) -> list[str]:
    """An accelerator that is not there, more GPUs than there are, a student to be shared among one device."""
    available = AVAILABLE.get(train.accelerator)
    if available is not None and not available():
        return [f"train.accelerator: {train.accelerator}, but torch finds no such device here: choose auto or cpu"]
    gpus = torch.cuda.device_count() if train.accelerator in ("auto", "cuda") else 0
    devices = (gpus or 1) if train.devices == "auto" else train.devices
    if gpus and devices > gpus:
        return [f"train.devices: {devices}, but torch finds {gpus} here: choose at most {gpus}, or auto"]
    if train.strategy == "fsdp" and devices * train.nodes == 1:
        return ["train.strategy: fsdp shares the student among devices, and this is one: choose ddp"]
    return []


def machine_problems(fabric: Fabric, nodes: int) -> list[str]:
    """Several machines that nothing connects: each would wait for the others, deaf to signals."""
    environment = getattr(fabric.strategy, "cluster_environment", None)  # the launcher, as Fabric recognises it
    if nodes == 1 or not isinstance(environment, LightningEnvironment) or "MASTER_ADDR" in os.environ:
        return []
    return [
        f"train.nodes: {nodes}, but no launcher has started this process: start kdtrain on each machine by torchrun or srun, "
        "or set train.nodes=1"
    ]
