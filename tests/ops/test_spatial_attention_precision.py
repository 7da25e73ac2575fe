"""Spatial attention of large logits: its errors against float64 beside those of eager torch, on the CPU and in Triton.

The logits of all cases are whole multiples of a power of two and so exact in float32: what is measured is what becomes of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kdops
from kdops.dispatch import SPECS

DEVICES = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
KERNELS = [
    name
    for name, device in DEVICES.items()
    if SPECS["spatial_attention"].backend(name).supports([torch.zeros(1, 1, 1, device=device)]) is None
]
ROUNDINGS = 8 * torch.finfo(torch.float32).eps
every_kernel = pytest.mark.parametrize("backend", KERNELS)
both_ways = pytest.mark.parametrize("normalize", ["key", "query"])

Maps = tuple[Tensor, Tensor, Tensor]


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(shape[-1])).float()


def value(positions: int) -> Tensor:
    return torch.randn(1, 5, positions, generator=torch.Generator().manual_seed(0))


def results(maps: Maps, grad: Tensor, dtype: torch.dtype, backend: str, **options: object) -> list[Tensor]:
    """The result and the gradients of query, key and value, in float64 on the CPU."""
    device = DEVICES.get(backend, "cpu")
    given = [t.to(device, dtype).requires_grad_() for t in maps]
    out = kdops.spatial_attention(*given, backend=backend, **options)
    return [t.detach().cpu().double() for t in (out, *torch.autograd.grad(out, given, grad.to(device, dtype)))]


def terms(maps: Maps, grad: Tensor, scale: float, normalize: str) -> list[Tensor]:
    """The same, but every sum is that of its terms' magnitudes: where terms cancel, roundings are measured by them."""
    query, key, value, grad = (t.double() for t in (*maps, grad))
    weights = (scale * key.mT @ query).softmax(2 if normalize == "query" else 1)
    slopes = abs(scale) * weights * (value.abs().mT @ grad.abs())
    return [value.abs() @ weights, key.abs() @ slopes, query.abs() @ slopes.mT, grad.abs() @ weights.mT]


def check(maps: Maps, scale: float, normalize: str, backend: str) -> None:
    """Twice the error of eager torch, and a few roundings."""
    grad = torch.randn(1, 5, maps[0].shape[2], generator=torch.Generator().manual_seed(1))
    options = {"scale": scale, "normalize": normalize}
    exact = results(maps, grad, torch.float64, "reference", **options)
    eager = results(maps, grad, torch.float32, "reference", **options)
    found = results(maps, grad, torch.float32, backend, **options)
    for mine, theirs, truth, cancels in zip(found, eager, exact, terms(maps, grad, **options), strict=True):
        allowed = 2 * (theirs - truth).abs().max() + ROUNDINGS * cancels.max()
        assert (mine - truth).abs().max() <= allowed


@every_kernel
@both_ways
@pytest.mark.parametrize("positions", [(150, 200), (20, 24)], ids=["many positions", "few positions"])
@pytest.mark.parametrize("magnitude", [10.0, 1e2, 1e3, 1e4])
def test_constant_maps(backend: str, normalize: str, magnitude: float, positions: tuple[int, int]) -> None:
    """Logits up to 4e8, all equal; of few positions the CPU keeps them for backward."""
    query, key = (torch.full((1, 16, n), magnitude) for n in positions)
    check((query, key, value(positions[1])), 0.25, normalize, backend)


@every_kernel
@both_ways
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_pictures(backend: str, normalize: str, scale: float) -> None:
    """Colours from 200 to 230, unscaled: logits around 1.4e5, whose softmaxes are mostly a single one."""
    check((whole(200, 231, 1, 3, 150), whole(200, 231, 1, 3, 200), value(200)), scale, normalize, backend)


@every_kernel
@both_ways
def test_logits_from_64_to_200(backend: str, normalize: str) -> None:
    query, key = (whole(8, 15, 1, 16, n) / 4 for n in (150, 200))
    check((query, key, value(200)), 1.0, normalize, backend)
