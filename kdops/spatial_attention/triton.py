"""Spatial attention on a GPU: which sweeps (triton_sweeps.py) make the result and each gradient, and how they are launched."""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor

from .. import tiles
from ..layout import GradientColumns
from ..tiles import Features, features
from .table import Tile, tile_for
from .triton_sweeps import _attend, _delta, _slopes

FEW_CHANNELS = 16  # which a product of tiles has at least
SMALLEST = 2.0**-126  # scale forward: 0 would make NaN of the -infinity of columns that do not exist


def _precision(channels: int) -> str:
    """Of float32 products: of few channels in full, which takes no longer there and leaves 0 where terms cancel."""
    return "ieee" if channels <= FEW_CHANNELS else tiles.precision()


def _launch_attend(
    rows: Features,
    columns: Features,
    values: Features | None,
    out: Features | None,
    statistics: Tensor | None,
    scale: float,
    given: bool,
    tile: Tile | None = None,
) -> None:
    channels = rows.data.shape[1]
    value_channels = channels if values is None else values.data.shape[1]
    sweep = "attend given" if given else "attend shared" if values is None else "attend"
    tile = tile or tile_for(sweep, max(channels, value_channels), rows.data.dtype)
    slices = 1 if out is None else tiles.cdiv(value_channels, tile.slice)
    apart = slices > 1 or channels > tile.held  # the columns are not on chip as they are summed up
    _attend[(rows.data.shape[0] * slices * tiles.cdiv(rows.positions, tile.rows),)](
        rows,
        columns,
        columns if values is None and apart else values,
        out,
        statistics,
        max(abs(scale) * log2(e), SMALLEST),
        scale < 0,
        given,
        channels,
        tiles.parts(min(channels, tile.held)),
        value_channels,
        tiles.parts(min(value_channels, tile.slice)),
        slices,
        tile.rows,
        tile.columns,
        columns.positions % tile.columns == 0,
        tile.stages,
        _precision(max(channels, value_channels)),
        tile.late and values is not None and out is not None,
        tile.together,
        **tile.options,
        **tiles.OPTIONS,
    )


def _launch_slopes(
    rows: Features,
    row_values: Features | None,
    columns: Features,
    column_values: Features | None,
    statistics: Tensor,
    delta: Tensor,
    gradient: Features | None,
    scale: float,
    by_column: bool,
    tile: Tile | None = None,
) -> None:
    channels = rows.data.shape[1]
    value_channels = (columns if column_values is None else column_values).data.shape[1]
    shared = row_values is None
    tile = tile or tile_for("slopes shared" if shared else "slopes", max(channels, value_channels), rows.data.dtype)
    slices = 1 if gradient is None else tiles.cdiv(channels, tile.slice)
    _slopes[(rows.data.shape[0] * slices * tiles.cdiv(rows.positions, tile.rows),)](
        rows,
        row_values,
        columns,
        column_values,
        statistics,
        delta,
        gradient,
        scale,
        scale * log2(e),
        by_column,
        channels,
        tiles.parts(min(channels, tile.held)),
        value_channels,
        tiles.parts(min(value_channels, tile.held)),
        slices,
        tiles.parts(min(channels, tile.slice)),
        tile.rows,
        tile.columns,
        columns.positions % tile.columns == 0,
        tile.stages,
        _precision(max(channels, value_channels)),
        tile.ahead and by_column,
        tile.together,
        **tile.options,
        **tiles.OPTIONS,
    )


def _launch_delta(out: Features, grad: Features, delta: Tensor, scale: float) -> None:
    batch, channels, _ = out.data.shape
    rows = max(16, 4096 // tiles.next_power_of_2(channels))
    _delta[(batch * tiles.cdiv(out.positions, rows),)](
        out, grad, delta, scale, channels, tiles.parts(channels), rows, num_warps=4, **tiles.OPTIONS
    )


def spatial_attention(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float | None, over_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, C, *Sq), key (B, C, *Sk), value (B, Cv, *Sk), or None for the key -> (B, Cv, *Sq), statistics (B, N, 2), no logits."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    q, k, v = features(query), features(key), None if value is None else features(value)
    out = query.new_empty((query.shape[0], (key if value is None else value).shape[1], *query.shape[2:]))
    normalised = k if over_query else q
    statistics = query.new_empty((query.shape[0], normalised.positions, 2), dtype=torch.float32)
    if query.shape[0] > 0:
        if over_query:
            _launch_attend(k, q, None, None, statistics, scale, given=False)
        _launch_attend(q, k, v, features(out), statistics, scale, given=over_query)
    return out, statistics, statistics.new_empty(0)


def spatial_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    logits: Tensor,
    scale: float | None,
    over_query: bool,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, (0,) where one is not needed. Where value is None, that of the key includes its role as value."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    found = (
        GradientColumns(query, need_query),
        GradientColumns(key, need_key),
        GradientColumns(key if value is None else value, need_value),
    )
    if query.shape[0] > 0:
        of_query, of_key, of_value = (features(g.columns) if g.needed else None for g in found)
        q, k, v, g = features(query), features(key), None if value is None else features(value), features(grad)
        delta = statistics.new_empty(statistics.shape[:2])
        if (of_query or of_key) and over_query:
            _launch_slopes(k, v, q, g, statistics, delta, None, scale, by_column=False)
        elif of_query or of_key:
            _launch_delta(features(out), g, delta, scale)
        if of_query:
            _launch_slopes(q, g, k, v, statistics, delta, of_query, scale, by_column=over_query)
        if of_key:
            _launch_slopes(k, v, q, g, statistics, delta, of_key, scale, by_column=not over_query)
        if of_value:
            _launch_attend(k, q, g, of_value, None if over_query else statistics, scale, given=not over_query)
    grad_query, grad_key, grad_value = (g.finish() for g in found)
    return grad_query, grad_key, grad_value
