"""Activation checkpointing: blocks of a network keep their inputs alone, and run a second time in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.errors import InputError


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of a kind that stands several times in one container: residual groups, transformer blocks."""
    found: dict[str, nn.Module] = {}
    waiting: list[tuple[str, nn.Module]] = [("", network)]
    while waiting:
        prefix, module = waiting.pop(0)
        kinds = Counter(type(child) for child in module.children())
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            several = kinds[type(child)] > 1 and any(True for _ in child.children())
            if several and isinstance(module, (nn.Sequential, nn.ModuleList)):
                found[path] = child
            else:
                waiting.append((path, child))
    return found


def recompute(network: nn.Module, tapped: Iterable[str]) -> None:
    """Let every repeated block of `network` recompute its activations in the backward pass.

    Args:
        network: changed in place; names and weights stay as they are.
        tapped: module paths of its taps, which may be a block or lie outside of all, but not within one: a tap would be made twice.

    Raises:
        InputError: a tap within a block, or no block that repeats.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise InputError("train.recompute: this network has no repeated blocks; set it to false")
    within = sorted(path for path in tapped if any(path.startswith(f"{block}.") for block in blocks))
    if within:
        raise InputError(
            f"train.recompute: the tap {within[0]} lies within a block that would run twice: "
            f"tap one of {', '.join(blocks)}, or set it to false"
        )
    for block in blocks.values():
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
