"""Self-attention inside shifted windows, as SwinIR and Uformer share it (Liu et al., ICCV 2021, sections 3.1-3.2).

Features are (B, H, W, C) here, with H and W multiples of the window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

APART = -100.0  # added to the logits of positions that are no neighbours


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(C / heads) + bias of the relative position) v in each window; `qkv` comes from the subclass.

    `relative_position_index` is a constant that published checkpoints hold.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.proj = nn.Linear(channels, channels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query, key, value (B * windows, N, C), mask (windows, N, N) or None -> (B * windows, N, C); N = window^2."""
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        logits = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1) + bias  # (B * windows, heads, N, N)
        if mask is not None:
            windows = mask.shape[0]  # len() would fix it at export
            logits = (logits.unflatten(0, (-1, windows)) + mask[:, None]).flatten(0, 1)
        attended: Tensor = self.proj((logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        return attended


def in_windows(x: Tensor, window: int, shift: int, attention: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Cuts (B, H, W, C) into windows, calls attention(windows, mask) on them, and puts the results together again.

    With a shift the features are rolled by it before and back after, and the mask keeps apart what the roll has brought together.
    """
    height, width = x.shape[1:3]
    mask = None
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
        mask = shift_mask(height, width, window, shift, x)
    attended = merge(attention(partition(x, window), mask), window, height, width)
    return attended.roll((shift, shift), (1, 2)) if shift else attended


def partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * H/window * W/window, window^2, C)."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height // window, window, width // window, window, channels)
    return cut.transpose(2, 3).reshape(-1, window * window, channels)


def merge(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of partition."""
    channels = windows.shape[-1]
    cut = windows.reshape(-1, height // window, width // window, window, window, channels)
    return cut.transpose(2, 3).reshape(-1, height, width, channels)


def shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(windows, N, N): 0 between positions that were neighbours before the roll, else -100."""

    def strips(size: int) -> Tensor:
        place = torch.arange(size, device=like.device)
        return (place >= size - window).long() + (place >= size - shift).long()

    regions = strips(height)[:, None] * 3 + strips(width)  # (H, W)
    cut = partition(regions[None, :, :, None], window)[..., 0]  # (windows, N)
    return (cut[:, :, None] != cut[:, None, :]).to(like.dtype) * APART


def relative_positions(window: int) -> Tensor:
    """(N, N): the row of the bias table for each pair of positions, (dy + window - 1) * (2 * window - 1) + dx + window - 1."""
    places = torch.arange(window)
    y, x = places.repeat_interleave(window), places.repeat(window)
    dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return dy * (2 * window - 1) + dx


def window_of(table: Tensor) -> int:
    """The window whose bias table this is: (2 * window - 1)^2 rows."""
    rows: int = round(len(table) ** 0.5)
    return (rows + 1) // 2
