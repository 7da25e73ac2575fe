"""PIQE: blocks of 16 x 16 of the locally normalised image, which of them are distorted and how."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..registration import accumulator
from .borders import mirrored
from .brisque import Mscn

BLOCK = 16
SEGMENT = 6
ACTIVITY = 0.1  # variance above which a block counts
IMPAIRED = 0.1  # standard deviation below which a segment of its border does
TINY = 1e-8


def scores(image: Tensor, mscn: Mscn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image (B, 1, H, W) -> score (B,) and the masks artifact, noise, activity (B, ceil(H / 16), ceil(W / 16))."""
    x = image.detach() if image.dtype == torch.float64 else image.detach().float()
    peak = x.amax(dim=(1, 2, 3), keepdim=True)
    x = (255 * (x / peak.where(peak > 0, 1))).round()
    for axis in (-2, -1):
        whole = (x.shape[axis] + BLOCK - 1) // BLOCK * BLOCK
        x = mirrored(x, axis, 0, BLOCK - 1).narrow(axis, 0, whole)
    normalised = mscn(x, 7, 7 / 6, 1.0, True)[0]
    variance, deviations = block_variance(normalised).squeeze(1), edge_deviations(normalised, tiny=0.0).squeeze(1)
    activity = variance > ACTIVITY  # (B, h, w)
    artifact = activity & (deviations < IMPAIRED).flatten(-2).any(dim=-1)
    noise = activity & _noisy(blocks(normalised).squeeze(1), variance.sqrt())
    distortion = artifact * (1 - variance) + noise * variance
    score = 100 * (distortion.sum(dim=-1).sum(dim=-1) + 1) / (activity.sum(dim=(-2, -1)) + 1)
    return score.to(image.dtype), artifact, noise, activity


def blocks(maps: Tensor) -> Tensor:
    """(B, C, 16 h, 16 w) -> (B, C, h, w, 16, 16)."""
    checks.maps("maps", maps)
    if maps.shape[-2] % BLOCK or maps.shape[-1] % BLOCK:
        raise ValueError(
            f"maps are {checks.describe(maps)}, but height and width must be multiples of {BLOCK}: crop or pad them."
        )
    return maps.unfold(-2, BLOCK, BLOCK).unfold(-2, BLOCK, BLOCK)


def block_variance(normalised: Tensor) -> Tensor:
    """Unbiased variance of every 16 x 16 block: (B, C, 16 h, 16 w) -> (B, C, h, w), differentiable. Source: methods.md 5.2, step 2.

    A block is spatially active where it exceeds 0.1: `block_variance(x) > 0.1` is the activity mask, which has no gradient.
    Raises ValueError for other sizes, TypeError for what is not floating point.
    """
    return blocks(normalised).var(dim=(-2, -1))


def edge_deviations(normalised: Tensor, *, tiny: float = TINY) -> Tensor:
    """Standard deviations along the borders of every 16 x 16 block: (B, C, 16 h, 16 w) -> (B, C, h, w, 4, 11), differentiable.

    sqrt(v + tiny), v the unbiased variance of each of the 11 segments of 6 pixels of the top, bottom, left and right border.
    PIQE sees an artifact where one of them is below 0.1. Raises as `block_variance`. Source: methods.md 5.2, step 3.
    """
    tiles = blocks(normalised)
    borders = torch.stack([tiles[..., 0, :], tiles[..., -1, :], tiles[..., 0], tiles[..., -1]], dim=-2)
    segments = borders.unfold(-1, SEGMENT, 1)  # (B, C, h, w, 4, 11, 6)
    wide = segments.to(accumulator(segments))  # in float16 `tiny` is 0: flat segments would have a gradient of 0 / 0
    return (wide.var(dim=-1) + tiny).sqrt().to(segments.dtype)


def _noisy(tiles: Tensor, deviation: Tensor) -> Tensor:
    """(B, h, w, 16, 16) and its standard deviation (B, h, w) -> (B, h, w): noise spreads over a block, structure does not."""
    middle = slice(BLOCK // 2 - 1, BLOCK // 2 + 1)
    surround = torch.cat([tiles[..., : middle.start], tiles[..., middle.stop :]], dim=-1)
    ratio = tiles[..., middle].std(dim=(-2, -1)) / surround.std(dim=(-2, -1))
    ratio = ratio.nan_to_num(nan=0.0, posinf=float("inf"))
    beta = (deviation - ratio).abs() / torch.maximum(deviation, ratio)
    noisy: Tensor = deviation > 2 * beta
    return noisy
