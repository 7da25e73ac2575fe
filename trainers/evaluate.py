"""Measuring networks: quality on a validation set, parameters, multiply-accumulates; and what they have to beat beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from trainers.data.resize import imresize
from trainers.data.sets import ValPair
from trainers.errors import InputError
from trainers.inference import Restorer
from trainers.metrics import Protocol
from trainers.results import baseline_name


def evaluate(
    restorer: Restorer,
    pairs: Iterable[ValPair],
    protocol: Protocol,
    scale: int,
    device: torch.device | str = "cpu",
    extra: Callable[[Tensor], dict[str, float]] = lambda restored: {},
) -> dict[str, Any]:
    """Restores every image whole and measures it.

    restorer  a network, or any function from a batch of one image to the restored one; networks run in eval mode, and each
              of their modules is put back to the mode it was in
    extra     measures a restored image (C, H, W) by itself, such as `no_reference.NoReference`
    Returns {"psnr": dB, "ssim": ..., "per_image": {name: {"psnr": dB, "ssim": ...}}}; all but the last are means over images.
    Raises ValueError when there is no image, InputError, which names it, for one that the protocol does not measure.
    """
    device = torch.device(device)
    per_image = {}
    with torch.inference_mode(), eval_mode(restorer):
        for name, lq, gt in pairs:
            restored = restorer(lq.unsqueeze(0).to(device)).squeeze(0)
            if device.type == "mps":  # has no float64, which the metrics use
                restored = restored.cpu()
            try:
                measured = protocol.measure(restored, gt.to(restored.device), scale)
            except ValueError as error:
                raise InputError(f"{name}: protocol {protocol.name} does not measure it: {error}") from None
            per_image[name] = measured | extra(restored)
    if not per_image:
        raise ValueError("there is no image to measure; give a set with at least one pair")
    metrics = next(iter(per_image.values()))
    means = {metric: sum(image[metric] for image in per_image.values()) / len(per_image) for metric in metrics}
    return {**means, "per_image": per_image}


@contextmanager
def eval_mode(restorer: Restorer) -> Iterator[None]:
    """Eval mode for the time of the block; parts that were in eval mode before (a frozen layer) stay in it after."""
    modules = list(restorer.modules()) if isinstance(restorer, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def bicubic(lq: Tensor, scale: int) -> Tensor:
    """MATLAB's bicubic upsampling, the baseline of super-resolution: (..., h, w) -> (..., scale * h, scale * w), clipped to [0, 1]."""
    return imresize(lq, float(scale)).clamp(0, 1)


def baseline(scale: int) -> tuple[str, Restorer]:
    """What a network has to beat, and its name in results: bicubic upsampling, or the input as it is."""
    return baseline_name(scale), (lambda lq: lq.clamp(0, 1)) if scale == 1 else partial(bicubic, scale=scale)


def count_parameters(network: nn.Module) -> int:
    """Trainable or not, without buffers."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one forward pass on an input of this shape, in convolutions and matrix products.

    Half of what torch's FlopCounterMode counts. Nothing is computed: the pass runs on shapes only (the meta device).
    """
    held = [*network.named_parameters(), *network.named_buffers()]
    state = {name: value.detach().to("meta") for name, value in held}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), eval_mode(network):
        functional_call(network, state, (torch.empty(shape, device="meta"),))
    return int(counter.get_total_flops()) // 2
