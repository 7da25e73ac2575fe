"""How the Triton kernels of the codebook cut their work into tiles: shipped, so that no first call stops to tune itself."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import tiles

ALL = 1 << 30


class Tile(NamedTuple):
    """How one kernel is shared among threads."""

    rows: int
    codes: int
    warps: int
    stages: int
    slice: int = ALL  # channels of the result that a program sums up: more are shared among several programs
    held: int = ALL  # channels of the logits on chip at a time: more of them stream through, so many at a time


FLOAT32: dict[tuple[str, int], dict[int, Tile]] = {
    ("statistics", 4): {512: Tile(64, 32, 8, 1, held=32)},
    ("slopes", 4): {512: Tile(64, 32, 8, 1, 64, 32)},
    ("code_sums", 4): {512: Tile(16, 64, 8, 1, 64, 32)},
}
# By architecture or the first part of its name, kernel and bytes of a number: the tile of up to so many channels. Those of cuda:90 for 64
# and 256 channels of 2 bytes were the fastest on an H200 (`python -m benchmarks.tune codebook 64 256`), the others are chosen among the
# largest that spill no register and fit the shared memory when compiled (docs/performance/codebook.md).
TILES: dict[str, dict[tuple[str, int], dict[int, Tile]]] = {
    "cuda:80": {
        ("statistics", 2): {128: Tile(128, 64, 8, 2), 512: Tile(64, 32, 8, 2), 1024: Tile(32, 32, 8, 1)},
        ("slopes", 2): {
            64: Tile(128, 64, 8, 2),
            128: Tile(64, 64, 8, 2),
            512: Tile(32, 32, 8, 2),
            1024: Tile(16, 32, 8, 1),
        },
        ("code_sums", 2): {128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1), 1024: Tile(16, 16, 8, 1)},
        **FLOAT32,
    },
    "cuda": {  # every other GPU of NVIDIA: at most 99 KiB of shared memory, as sm_86, sm_89 and sm_120 have
        ("statistics", 2): {
            128: Tile(128, 64, 8, 2),
            256: Tile(64, 32, 8, 2),
            512: Tile(32, 32, 8, 1),
            1024: Tile(16, 16, 4, 1),
        },
        ("slopes", 2): {
            64: Tile(128, 64, 8, 2),
            128: Tile(64, 64, 8, 2),
            512: Tile(32, 32, 8, 2),
            1024: Tile(16, 16, 4, 1, 256),
        },
        ("code_sums", 2): {
            128: Tile(32, 64, 8, 2),
            256: Tile(32, 32, 8, 1),
            512: Tile(16, 16, 8, 1),
            1024: Tile(16, 16, 8, 1, 256),
        },
        **FLOAT32,
    },
    "cuda:90": {
        ("student", 2): {64: Tile(64, 128, 4, 2), 128: Tile(64, 32, 4, 2)},
        ("statistics", 2): {
            128: Tile(128, 64, 8, 2),
            256: Tile(128, 64, 8, 3),
            512: Tile(64, 32, 4, 2),
            1024: Tile(32, 32, 8, 1),
        },
        ("slopes", 2): {
            128: Tile(128, 64, 8, 2),
            256: Tile(128, 64, 8, 3),
            512: Tile(64, 16, 4, 2, 128),
            1024: Tile(16, 32, 8, 1),
        },
        ("code_sums", 2): {128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1), 1024: Tile(16, 16, 8, 1)},
        # Four warps for each 64 rows of a product: with eight, triton 3.6 multiplies float32 wrongly (docs/performance).
        ("statistics", 4): {512: Tile(128, 32, 8, 1, held=32)},
        ("slopes", 4): {512: Tile(128, 32, 8, 1, 64, 32)},
        ("code_sums", 4): {512: Tile(16, 64, 4, 1, 64, 32)},
    },
    "cuda:100": {
        ("student", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2)},
        ("statistics", 2): {
            128: Tile(128, 64, 8, 2),
            256: Tile(64, 32, 4, 2),
            512: Tile(64, 32, 8, 2),
            1024: Tile(32, 32, 8, 1),
        },
        ("slopes", 2): {
            128: Tile(128, 64, 8, 2),
            256: Tile(128, 32, 8, 2),
            384: Tile(32, 32, 8, 1),
            512: Tile(32, 32, 8, 2),
            1024: Tile(16, 32, 8, 1),
        },
        ("code_sums", 2): {128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1), 1024: Tile(16, 16, 8, 1)},
        **FLOAT32,
    },
    "hip": {
        ("statistics", 2): {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2), 1024: Tile(16, 32, 4, 1)},
        ("slopes", 2): {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2), 1024: Tile(16, 32, 4, 1)},
        ("code_sums", 2): {128: Tile(32, 32, 4, 1), 1024: Tile(16, 32, 4, 1)},
        ("statistics", 4): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 512: Tile(16, 32, 4, 1, 128, 64)},
        ("slopes", 4): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 512: Tile(16, 32, 4, 1, 128, 64)},
        ("code_sums", 4): {64: Tile(32, 32, 4, 1), 512: Tile(16, 32, 4, 1, 128, 64)},
    },
    "interpreter": {
        **{
            (kernel, size): {128: Tile(64, 64, 4, 1), 512: Tile(64, 64, 4, 1, 128, 64)}
            for kernel in ("statistics", "slopes", "code_sums")
            for size in (2, 4)
        },
        **{("student", size): {64: Tile(64, 64, 4, 1)} for size in (2, 4)},
    },
}


def tile_for(kernel: str, channels: int, dtype: torch.dtype) -> Tile:
    """From the table; more channels than it knows get its last tile."""
    sizes = _table()[kernel, dtype.itemsize]
    return next((tile for most, tile in sizes.items() if channels <= most), sizes[max(sizes)])


def in_one_sweep(channels: int, dtype: torch.dtype) -> bool:
    """Whether the student's slopes are made in the sweep of the statistics, which holds two sums of so many channels, or in a second."""
    return channels <= max(_table().get(("student", dtype.itemsize), {0: None}))


def _table() -> dict[tuple[str, int], dict[int, Tile]]:
    architecture = tiles.architecture()
    return TILES.get(architecture) or TILES[architecture.partition(":")[0]]
