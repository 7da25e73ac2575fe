"""What windowed attention sees: the windows of SwinIR and Uformer and their shifts."""

from __future__ import annotations

import torch

from trainers.models import MODELS
from trainers.models.swinir import Attention
from trainers.models.windows import in_windows, merge, partition, relative_positions


def test_shifted_windows_see_only_their_neighbours() -> None:
    """With a shift, positions on the two sides of the image's border share a window, and must not see each other."""
    network = Attention(channels=4, window=4, heads=2)
    x = torch.rand(1, 8, 8, 4, requires_grad=True)
    seen = in_windows(x, 4, 2, network)[0, 0, 0].sum()
    (gradient,) = torch.autograd.grad(seen, x)
    reached = gradient[0].abs().sum(dim=2) > 1e-20  # beyond the mask it is e^-100
    assert reached[:2, :2].all()
    assert reached.sum() == 4


def test_window_partition_is_undone() -> None:
    x = torch.rand(2, 8, 12, 3)
    windows = partition(x, 4)
    assert windows.shape == (12, 16, 3)
    assert torch.equal(windows[1], x[0, :4, 4:8].reshape(16, 3))
    assert torch.equal(merge(windows, 4, 8, 12), x)


def test_relative_positions_are_those_of_swin() -> None:
    """dy and dx from -1 to 1 in a window of 2, row by row: the published index of a 2 x 2 window."""
    assert relative_positions(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_uformer_shifts_where_an_image_of_its_training_is_more_than_a_window() -> None:
    entry = MODELS["uformer"]
    options = {"embed_dim": 4, "depths": [2, 2, 2, 2, 2], "heads": [1, 2, 2, 2, 1], "window": 2, "train_size": 8}
    network = entry.build(entry.options(**options))
    shifts = {
        path: [block.shift for block in level.blocks]
        for path, level in network.named_children()
        if hasattr(level, "blocks")
    }
    assert shifts == {
        "encoderlayer_0": [0, 1],
        "encoderlayer_1": [0, 1],
        "conv": [0, 0],
        "decoderlayer_0": [0, 1],
        "decoderlayer_1": [0, 1],
    }
