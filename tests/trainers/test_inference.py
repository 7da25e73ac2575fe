"""trainers.inference: tiles equal the whole image where the network is local, and the self-ensemble is the mean it should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainers.inference import SelfEnsemble, Tiled, oriented
from trainers.models.edsr import EDSR, EDSROptions


def edsr(scale: int) -> EDSR:
    """Sees 1 + 2 * blocks + 1 convolutions of 3 x 3 and the tail's: at most 6 pixels."""
    torch.manual_seed(0)
    return EDSR(EDSROptions.model_validate({"scale": scale, "features": 4, "blocks": 1})).eval()


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(scale=st.sampled_from([1, 2, 3]), height=st.integers(20, 130), width=st.integers(20, 130))
def test_tiles_equal_the_whole_image_where_the_network_is_local(scale: int, height: int, width: int) -> None:
    network, whole = edsr(scale), image(height, width)
    tiled = Tiled(network, 48, overlap=24, scale=scale)(whole)
    torch.testing.assert_close(tiled, network(whole), atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_network_that_sees_farther_than_the_overlap_is_approximated() -> None:
    network, whole = edsr(1), image(100, 100)
    difference = (Tiled(network, 48, overlap=4)(whole) - network(whole)).abs()
    assert difference.max() > 1e-4  # so the test above can fail
    assert difference.median() < 1e-6


class Grid(nn.Module):
    """Sees the place of a pixel in its 8 x 8 cell, as networks that downsample do, and sums over the cell."""

    def forward(self, image: Tensor) -> Tensor:
        assert all(side % 8 == 0 for side in image.shape[-2:])
        cells = nn.functional.avg_pool2d(image, 8)
        return image + cells.repeat_interleave(8, -1).repeat_interleave(8, -2)


@given(height=st.sampled_from([40, 72, 96]), width=st.sampled_from([48, 80, 136]))
def test_tiles_begin_on_the_grid_of_the_network(height: int, width: int) -> None:
    whole = image(height, width)
    torch.testing.assert_close(Tiled(Grid(), 48, overlap=16, multiple_of=8)(whole), Grid()(whole))


@given(size=st.integers(1, 400), overlap=st.sampled_from([4, 16, 24]), unit=st.sampled_from([1, 4]))
def test_spans_cover_the_axis_and_weights_never_vanish(size: int, overlap: int, unit: int) -> None:
    tiled = Tiled(nn.Identity(), 48, overlap=overlap, multiple_of=unit)
    spans, weights = tiled.spans(size), torch.zeros(size)
    for start, stop in spans:
        assert start % unit == 0
        assert min(size, 48) <= stop - start < 48 + unit
        weights[start:stop] += tiled.ramps(start, stop, size)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert weights.min() > 0.99  # ramps of neighbours sum to 1; where three tiles meet, to more


def test_small_images_are_not_cut() -> None:
    calls: list[tuple[int, ...]] = []
    tiled = Tiled(lambda x: (calls.append(tuple(x.shape)), x)[1], 64, overlap=16)
    tiled(image(64, 30, batch=2))
    assert calls == [(2, 3, 64, 30)]
    tiled(image(65, 30))
    assert calls[1:] == [(1, 3, 64, 30)] * 2  # never more than a tile in memory


@pytest.mark.parametrize(("tile", "overlap", "unit"), [(64, 2, 1), (64, 30, 1), (64, 36, 1), (60, 16, 8), (64, 20, 8)])
def test_tiles_that_do_not_fit(tile: int, overlap: int, unit: int) -> None:
    with pytest.raises(ValueError, match=str(overlap)):
        Tiled(nn.Identity(), tile, overlap=overlap, multiple_of=unit)


def test_the_eight_orientations_differ_and_turn_back() -> None:
    picture = image(5, 7)
    turned = [oriented(picture, turn) for turn in range(8)]
    assert len({(t.shape, t.contiguous().numpy().tobytes()) for t in turned}) == 8
    for turn, one in enumerate(turned):
        assert torch.equal(oriented(one, turn, back=True), picture)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2])
def test_self_ensemble_does_not_care_for_orientation(scale: int) -> None:
    ensemble, picture = SelfEnsemble(edsr(scale)), image(12, 17)
    plain = ensemble(picture)
    assert plain.shape == (1, 3, 12 * scale, 17 * scale)
    for turn in range(8):
        torch.testing.assert_close(ensemble(oriented(picture, turn)), oriented(plain, turn))
    assert not torch.allclose(plain, ensemble.restorer(picture))


def test_modes_and_devices_reach_the_network() -> None:
    network = edsr(1).train()
    wrapped = SelfEnsemble(Tiled(network, 64))
    wrapped.eval()
    assert not network.training
    assert len(list(wrapped.parameters())) == len(list(network.parameters()))
