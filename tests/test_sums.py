"""The same bits for any number of threads, also where torch would cut a sum by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kdops


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_sums_over_many_positions_have_the_same_bits_for_any_number_of_threads(threads: None) -> None:
    """More than torch sums on one thread, and float64 Grams, whose last bit MKL changes."""
    generator = torch.Generator().manual_seed(0)
    student, codes = torch.randn(40000, 8, generator=generator), torch.randn(64, 8, generator=generator)
    anchors = torch.randn(70000, 2, generator=generator)
    maps = [torch.randn(3, c, 2000, generator=generator).double() for c in (16, 64)]
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cross_entropy = kdops.codebook_cross_entropy(student, student.flip(0), codes)
        ratio = kdops.contrastive_ratio(anchors, anchors.flip(0), anchors[:2])
        found.add((cross_entropy.item(), ratio.item(), *kdops.affinity_distance(*maps, p=2).tolist()))
    assert len(found) == 1
