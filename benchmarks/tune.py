"""Times tiles of spatial attention on the GPU that is here: `python -m benchmarks.tune [CHANNELS ...]`.

The fastest belong into kdops/spatial_attention/table.py. All candidates are compiled first, by a process for each core, then timed one
after the other: bfloat16, 65,536 positions, contiguous maps. A line for each sweep, fastest first: rows x columns x warps x stages x
channels of a slice, and milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from statistics import median

import torch
from triton.runtime.jit import JITFunction

from benchmarks.measure import on_device
from kdops import tiles
from kdops.spatial_attention.table import MOST_CHANNELS, Tile
from kdops.spatial_attention.triton import _launch_attend, _launch_slopes
from kdops.tiles import features

SIDE = 256
ROUNDS = 5
SWEEPS = ("attend", "attend given", "slopes", "slopes shared")
SHARED_MEMORY = 227 * 1024
Job = tuple[str, int, Tile]


def candidates(sweep: str, channels: int) -> Iterator[Tile]:
    """Those whose tiles can fit: a warpgroup of four warps for 64 rows, or two for 64 or 128; above 256 channels also in slices."""
    width = sum(tiles.parts(channels))
    row_maps, column_maps = (
        1 if sweep in ("attend", "attend given", "slopes shared") else 2,
        1 if sweep == "attend" else 2,
    )
    slices = (MOST_CHANNELS,) if channels <= 256 else (128, 256, MOST_CHANNELS)
    for (rows, warps), columns, stages, piece in product(
        ((64, 4), (64, 8), (128, 8)), (16, 32, 64, 128), (2, 3, 4), slices
    ):
        held = 2 * width * (row_maps * rows + column_maps * stages * columns)
        sums = rows * min(width, piece) // (32 * warps)  # registers of a thread
        if held <= SHARED_MEMORY and sums <= 192 and rows * columns >= 64 * 32:
            yield Tile(rows, columns, warps, stages, piece)


def launcher(sweep: str, channels: int, tile: Tile) -> Callable[[], None]:
    """Launches the sweep with this tile, on statistics that keep all numbers finite."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, channels, SIDE, SIDE)
    q, k, g = (features(torch.randn(shape, generator=generator, device="cuda").bfloat16()) for _ in range(3))
    statistics = torch.full((1, SIDE * SIDE), 18.0, device="cuda")
    delta, out, scale = torch.zeros_like(statistics), features(torch.empty_like(k.data)), channels**-0.5
    attend, slopes = partial(_launch_attend, tile=tile), partial(_launch_slopes, tile=tile)
    return {
        "attend": partial(attend, q, k, None, out, statistics, scale, False),
        "attend given": partial(attend, k, q, g, out, statistics, scale, True),
        "slopes": partial(slopes, q, g, k, q, statistics, delta, out, scale, False),
        "slopes shared": partial(slopes, k, None, q, g, statistics, delta, out, scale, True),
    }[sweep]


def compiled(job: Job) -> Job | None:
    """Compiles without launching, into triton's cache on the disk; None where the compiler refuses."""
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    try:
        launcher(*job)()
    except Exception:  # whatever a compiler raises: this candidate is no candidate
        return None
    finally:
        JITFunction.run = run
    return job


def main(counts: list[int]) -> None:
    jobs = [(sweep, c, tile) for c in counts for sweep in SWEEPS for tile in candidates(sweep, c)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = [job for job in pool.map(compiled, jobs) if job is not None]
    for c, sweep in product(counts, SWEEPS):
        found = []
        for job in (job for job in jobs if job[:2] == (sweep, c)):
            launch = launcher(*job)
            launch()
            found.append((median(on_device(launch, 0) for _ in range(ROUNDS)) * 1e3, job[2]))
        said = (f"{'x'.join(map(str, t[:5]))} {ms:.2f}" for ms, t in sorted(found))
        print(f"{c} channels, {sweep}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [64, 128])
