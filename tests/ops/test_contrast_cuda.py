"""Gradients by tensor cores, of more rows than the samples of the contract; tests/test_cuda_on_cpu.py does without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.contract import missing
from tests.cuda_on_cpu.checks import error_of_weights


@pytest.mark.gpu
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize(
    ("b", "k", "features"), [(16, 64, 4096), (5, 33, 4096), (23, 7, 1040), (6, 200, 2056), (40, 40, 256), (16, 16, 8)]
)
def test_signs_are_weighted_with_twelve_bits(b: int, k: int, features: int, wild: bool) -> None:
    """`wild`: rows of weights that differ by up to forty powers of ten, of which each gradient has its own scale."""
    for spec, backend, reason in missing():
        if (spec.name, backend) == ("pairwise_distance", "cuda"):
            pytest.skip(reason)  # there is a GPU, but not the extension
    torch.manual_seed(0)
    x, y = (torch.randn(n, features, device="cuda").bfloat16() for n in (b, k))
    weights = torch.randn(b, k, device="cuda") * (torch.logspace(-20, 20, k, device="cuda") if wild else 1)
    assert error_of_weights(x, y, weights) < 2**-11
