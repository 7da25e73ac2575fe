"""Gradients by tensor cores, of more rows than the samples of the contract; tests/test_cuda_on_cpu.py does without a GPU."""

from __future__ import annotations

import pytest
import torch

import kdops  # noqa: F401  (registers the ops)
from tests.contract import missing


@pytest.mark.gpu
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize(
    ("b", "k", "features"), [(16, 64, 4096), (5, 33, 4096), (23, 7, 1040), (6, 200, 2056), (40, 40, 256), (16, 16, 8)]
)
def test_signs_are_weighted_with_twelve_bits(b: int, k: int, features: int, wild: bool) -> None:
    """`wild`: rows of weights that differ by up to forty powers of ten, of which each gradient has its own scale."""
    for spec, backend, reason in missing():
        if (spec.name, backend) == ("pairwise_distance", "cuda"):
            pytest.skip(reason)
    torch.manual_seed(0)
    x, y = (torch.randn(n, features, device="cuda").bfloat16() for n in (b, k))
    weights = torch.randn(b, k, device="cuda") * (torch.logspace(-20, 20, k, device="cuda") if wild else 1)
    signs = torch.sign(x.double()[:, None] - y.double())
    exact = ((weights[..., None] * signs).sum(1), -(weights[..., None] * signs).sum(0))
    mine = torch.ops.kdops.pairwise_distance_backward(weights, x, y, 1, True, True)
    for axis, (m, e) in enumerate(zip(mine, exact, strict=True)):
        beyond = (m.double() - e).abs() - e.abs() * 2**-8  # its own rounding to bfloat16
        allowed = 2**-11 * weights.shape[1 - axis] ** 0.5 * weights.double().abs().amax(1 - axis)
        assert (beyond <= allowed[:, None]).all()
