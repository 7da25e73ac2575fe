"""How the Triton kernels of spatial attention cut their work into tiles: shipped, so that no first call stops to tune itself."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import tiles
from .spec import MOST_CHANNELS


class Tile(NamedTuple):
    """How one sweep is shared among threads."""

    rows: int
    columns: int
    warps: int
    stages: int
    slice: int = MOST_CHANNELS  # channels of the result that a program sums up: more are shared among several programs
    held: int = MOST_CHANNELS  # channels of the logits on chip: more of them stream through, so many at a time
    late: bool = False  # values that are not the columns are added a tile late, which takes registers
    ahead: bool = False  # a number of each column is loaded a tile ahead into registers, not into shared memory
    together: bool = False  # both numbers of a column's softmax are loaded as one
    registers: int | None = None  # of a thread at most, so that one more program shares a multiprocessor

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


# For each architecture, sweep and bytes of a number: the tile of up to so many channels. Those of cuda:90 for up to 384 channels of
# 2 bytes were the fastest of some 12 to 30 each on an H100 or H200; the others are chosen among those that spill fewest registers when
# compiled (docs/performance/spatial_attention.md). Where a table does not tell variants of a sweep apart, their first word names it. On
# sm_90 a warpgroup of four warps needs 64 rows of its own: with fewer, triton 3.6 lets both do the same products, and those of float32
# are wrong. All sweeps hold as many channels of the logits: summed in another order, large logits
# would be rounded otherwise than those of which the statistics are.
TILES: dict[str, dict[tuple[str, int], dict[int, Tile]]] = {
    "cuda": {  # every other GPU of NVIDIA: at most 99 KiB of shared memory, as sm_86, sm_89 and sm_120 have
        ("attend", 2): {
            128: Tile(128, 32, 8, 2),
            192: Tile(32, 32, 4, 2),
            256: Tile(64, 32, 8, 2),
            512: Tile(32, 32, 4, 2, 256),
        },
        ("slopes", 2): {128: Tile(128, 32, 8, 2), 384: Tile(32, 32, 4, 2), 512: Tile(16, 32, 4, 1, 128)},
        ("attend", 4): {64: Tile(64, 32, 8, 2, held=32), 512: Tile(64, 32, 8, 1, 128, 32)},
        ("slopes", 4): {512: Tile(64, 32, 8, 1, 64, 32)},
    },
    "cuda:90": {
        ("attend", 2): {
            64: Tile(64, 128, 4, 3, late=True),
            128: Tile(64, 64, 4, 3, late=True),
            192: Tile(128, 64, 8, 3, late=True),
            256: Tile(128, 64, 8, 2),
            384: Tile(128, 32, 8, 2),
            512: Tile(64, 32, 4, 2, 256),
        },
        ("attend shared", 2): {
            64: Tile(64, 128, 4, 4, registers=168),
            128: Tile(64, 64, 4, 4),
            256: Tile(128, 64, 8, 3),
            384: Tile(128, 32, 8, 3),
            512: Tile(64, 32, 4, 2, 256),
        },
        ("attend given", 2): {
            64: Tile(64, 128, 4, 3, late=True),
            128: Tile(64, 64, 4, 3, late=True, together=True),
            192: Tile(128, 64, 8, 3, late=True, together=True),
            256: Tile(128, 32, 8, 3, together=True),
            384: Tile(128, 32, 8, 2),
            512: Tile(64, 32, 4, 2, 256),
        },
        ("slopes", 2): {
            64: Tile(64, 128, 4, 3),
            128: Tile(128, 64, 8, 3),
            256: Tile(128, 32, 8, 3),
            384: Tile(64, 16, 4, 3),
            512: Tile(64, 16, 4, 2, 128),
        },
        ("slopes shared", 2): {
            64: Tile(64, 128, 4, 3),
            128: Tile(64, 64, 4, 3, ahead=True),  # in shared memory two programs fit to the byte
            192: Tile(128, 64, 8, 3, together=True),
            256: Tile(128, 64, 8, 2, together=True),
            384: Tile(128, 32, 8, 2),
            512: Tile(64, 16, 4, 2, 128),
        },
        ("attend", 4): {512: Tile(128, 32, 8, 1, 64, 32)},
        ("slopes", 4): {512: Tile(128, 32, 8, 1, 64, 32)},
    },
    "cuda:100": {
        ("attend", 2): {128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2), 512: Tile(64, 32, 8, 1, 256)},
        ("slopes", 2): {128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2), 512: Tile(64, 32, 8, 1, 128)},
        ("attend", 4): {64: Tile(64, 32, 4, 2, held=32), 512: Tile(128, 32, 8, 1, 128, 32)},
        ("slopes", 4): {512: Tile(64, 32, 8, 1, 128, 32)},
    },
    "hip": {
        ("attend", 2): {64: Tile(64, 64, 4, 1), 256: Tile(32, 32, 4, 1, 128), 512: Tile(16, 16, 4, 1, 128)},
        ("slopes", 2): {64: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1, 128), 512: Tile(16, 16, 4, 1, 128)},
        ("attend", 4): {64: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1, 128, 64), 512: Tile(16, 16, 4, 1, 128, 64)},
        ("slopes", 4): {64: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1, 128, 64), 512: Tile(16, 16, 4, 1, 128, 64)},
    },
    "interpreter": {
        (sweep, size): {
            128: Tile(64, 64, 4, 1, held=512 if size == 2 else 64, late=sweep == "attend", ahead=sweep == "slopes"),
            512: Tile(64, 64, 4, 1, 128, 512 if size == 2 else 64, together=True),
        }
        for sweep in ("attend", "slopes")
        for size in (2, 4)
    },
}


def tile_for(sweep: str, channels: int, dtype: torch.dtype) -> Tile:
    """The tile of a sweep on what kernels are now compiled for; `channels`, at most MOST_CHANNELS, is the larger count of the two products.

    Sweeps are "attend", "attend shared" (by columns that are their own values), "attend given" (the statistics), "slopes", and
    "slopes shared" (by rows that are their own values).
    """
    architecture = tiles.architecture()
    table = TILES.get(architecture) or TILES[architecture.partition(":")[0]]
    sizes = table.get((sweep, dtype.itemsize)) or table[sweep.split()[0], dtype.itemsize]
    return next(tile for limit, tile in sizes.items() if channels <= limit)
