"""Sharded training: each device holds a part of every trained tensor, and gathers a block's weights while it computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from trainers.architectures import Network
from trainers.methods import Batch
from trainers.networks import build_network
from trainers.recompute import repeated_blocks
from trainers.step import TrainStep

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each element of a parameter


class Sharded(DDPStrategy):
    """Fabric's processes and collectives, with PyTorch's fully_shard in DDP's place. (Fabric's own FSDP runs on GPUs alone.)"""

    def __init__(self) -> None:
        super().__init__()
        self._backward_sync_control = _Accumulation()

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]  # DDP's wrapper there, the module itself here
        """Shards a TrainStep in place. What its method holds frozen, feature networks and copies, stays whole on each device."""
        assert isinstance(module, TrainStep)
        for path, block in repeated_blocks(module.student).items():
            # Gradients must enter a shard by its output, so a block with a tap within belongs to the TrainStep's own.
            if not any(tap.startswith(f"{path}.") for tap in module.tapped_student.paths.values()):
                self.shard(block)
        frozen = {parameter for parameter in module.method.parameters() if not parameter.requires_grad}
        return self.shard(module, frozen)

    def shard(self, module: nn.Module, ignored: set[nn.Parameter] | None = None) -> nn.Module:
        """Leaves a part of each parameter on this device, but of the ignored ones; the whole comes and goes with each pass."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        # torch shards contiguous weights alone; images and features keep train.channels_last's layout.
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing from torch's type
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        return module


class _Accumulation(_BackwardSyncControl):
    """Gradients of all micro-batches but the last stay on their device. (Fabric's own leaves the exchange off after the last.)"""

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(not enabled)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)


def gathered(tree: Any) -> Any:
    """A state dict with its sharded tensors whole, on every device; all devices must call it. Others stay as they are."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    return [gathered(value) for value in tree] if isinstance(tree, list) else tree


def scattered(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The inverse for a module's state dict: of each whole tensor the part that this device holds in `module`."""
    own = module.state_dict()
    return {name: _part(value, own.get(name)) for name, value in state.items()}


def scattered_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same for an optimiser's state dict. A fused optimiser takes for granted that moments lie in memory as their parameters do."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            key: torch.empty_like(parameters[index]).copy_(_part(value, parameters[index])) if key in MOMENTS else value
            for key, value in found.items()
        }
        for index, found in state["state"].items()
    }
    return {**state, "state": moments}


def _part(value: Tensor, like: Tensor | None) -> Tensor:
    if isinstance(like, DTensor):
        # Every device has read the whole tensor, so nothing need be sent.
        return distribute_tensor(value.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
    return value


def whole(network: nn.Module, described: Network, device: torch.device) -> nn.Module:
    """A sharded network with all of its weights on this device, for validation; all devices must call it. Others stay as they are."""
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    weights = gathered(network.state_dict())
    with torch.random.fork_rng(devices=[]):
        built = build_network(described.model_copy(update={"weights": None}), "student")
    built.load_state_dict(weights)
    return built.to(device).eval().requires_grad_(False)


def gradient_norms(fabric: Fabric, train_step: TrainStep, batches: Sequence[Batch]) -> dict[str, float]:
    """`trainers.loss_weights.gradient_norms` of a sharded TrainStep: a forward and a backward pass for each term.

    torch gives no gradients of sharded parameters but those that a backward pass leaves, which are means over devices already.
    """
    norms = {}
    for name in train_step.method.losses:
        for batch in batches:
            with fabric.autocast():
                loss = train_step(batch)[name]
            (loss / len(batches)).backward()
        found = [parameter.grad for parameter in train_step.student.parameters() if parameter.grad is not None]
        norms[name] = float(gathered(get_total_norm(found)))
        train_step.zero_grad(set_to_none=True)
    return norms
