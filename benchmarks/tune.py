"""Times tiles of spatial attention on the GPU that is here: `python -m benchmarks.tune [CHANNELS ...]`.

The fastest belong into kdops/spatial_attention/table.py. All candidates are compiled first, by a process for each core, then timed one
after the other: bfloat16, 65,536 positions, contiguous maps. A line for each sweep, fastest first: rows x columns x warps x stages and
milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from statistics import median
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.measure import on_device
from kdops.spatial_attention import triton as kernels
from kdops.spatial_attention.table import Tile
from kdops.tiles import features

SIDE = 256
ROUNDS = 5
SWEEPS = ("attend", "attend given", "slopes", "slopes shared")
SHARED_MEMORY = 227 * 1024
Job = tuple[str, int, Tile]


def candidates(channels: int) -> Iterator[Tile]:
    """Those whose tiles can fit: a warpgroup of four warps for 64 or 128 rows, or two for 128."""
    width = triton.next_power_of_2(channels)
    for (rows, warps), columns, stages in product(((64, 4), (128, 4), (128, 8)), (32, 64, 128), (2, 3, 4)):
        if 2 * (2 * rows + 2 * stages * columns) * width <= SHARED_MEMORY:
            yield Tile(rows, columns, warps, stages)


def launcher(sweep: str, channels: int, tile: Tile) -> Callable[[], Any]:
    """Launches the sweep with this tile, on statistics that keep all numbers finite."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, channels, SIDE, SIDE)
    q, k, g = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(3))
    statistics = torch.full((1, SIDE * SIDE), 18.0, device="cuda")
    delta, out = torch.zeros_like(statistics), features(torch.empty_like(k))
    query, key, grad, scale = features(q), features(k), features(g), channels**-0.5
    calls: dict[str, Callable[[], Any]] = {
        "attend": lambda: kernels.spatial_attention(q, k, None, None, False),
        "attend given": lambda: kernels._launch_attend(key, query, grad, out, statistics, scale, True),
        "slopes": lambda: kernels._launch_slopes(query, grad, key, query, statistics, delta, out, scale, False),
        "slopes shared": lambda: kernels._launch_slopes(key, None, query, grad, statistics, delta, out, scale, True),
    }

    def launch() -> None:
        kernels.tile_for = lambda *_: tile
        calls[sweep]()

    return launch


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
    jobs = [(sweep, c, tile) for c in counts for sweep in SWEEPS for tile in candidates(c)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = [job for job in pool.map(compiled, jobs) if job is not None]
    for c, sweep in product(counts, SWEEPS):
        found = []
        for job in (job for job in jobs if job[:2] == (sweep, c)):
            launch = launcher(*job)
            launch()
            found.append((median(on_device(launch, 0) for _ in range(ROUNDS)) * 1e3, job[2]))
        said = (f"{t.rows}x{t.columns}x{t.warps}x{t.stages} {ms:.2f}" for ms, t in sorted(found))
        print(f"{c} channels, {sweep}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [64, 128])
