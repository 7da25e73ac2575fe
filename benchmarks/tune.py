"""Times tiles of the Triton kernels on the GPU that is here: `python -m benchmarks.tune {spatial_attention,codebook} CHANNELS ...`.

The fastest belong into the op's table.py. All candidates are compiled first, by a process for each core, then timed one after the other:
bfloat16, 65,536 positions of contiguous maps (16 images of them for the codebook, and 1,024 codes). A line for each kernel, fastest first:
tile and milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from math import log
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from benchmarks.measure import on_device
from kdops import tiles
from kdops.codebook import table as codebook_table
from kdops.codebook import triton as codebook
from kdops.spatial_attention import table as attention_table
from kdops.spatial_attention import triton as attention
from kdops.tiles import features

SIDE = 256
IMAGES = 16  # of the codebook's maps
CODES = 1024
ROUNDS = 5
SHARED_MEMORY = 227 * 1024
# A warpgroup of four warps for 64 rows: with two, triton 3.6 lets both do the same products.
ROWS_AND_WARPS = ((64, 4), (128, 8))
THREE_PROGRAMS = 168  # registers of a thread that let three programs of four warps share a multiprocessor
Launch = Callable[[], None]


class Job(NamedTuple):
    """One candidate."""

    op: str
    kernel: str  # its name in the op's table
    channels: int
    tile: attention_table.Tile | codebook_table.Tile


class Load(NamedTuple):
    """What a program of a kernel holds: maps of its rows and of a tile of columns, and sums of all channels for its rows."""

    rows: int
    columns: int
    sums: int


KERNELS = {
    "spatial_attention": {
        "attend": Load(1, 2, 1),
        "attend shared": Load(1, 1, 1),
        "attend given": Load(1, 2, 1),
        "slopes": Load(2, 2, 1),
        "slopes shared": Load(1, 2, 1),
    },
    "codebook": {"student": Load(2, 1, 2), "statistics": Load(2, 1, 0), "slopes": Load(2, 1, 1)},
}
# What else is worth trying: values that are not the columns a tile late; a number of each column a tile ahead; two as one.
ORDERS: dict[str, tuple[dict[str, bool], ...]] = {
    "attend": ({"late": True},),
    "attend given": ({"late": True}, {"together": True}, {"late": True, "together": True}),
    "slopes shared": ({"ahead": True}, {"together": True}),
}
TABLES = {"spatial_attention": attention_table, "codebook": codebook_table}


def candidates(op: str, kernel: str, channels: int) -> Iterator[Job]:
    """Those whose tiles can fit, of a kernel that is used; above 256 channels also with several programs for the channels of a result."""
    if op == "codebook" and (kernel == "student") != codebook_table.in_one_sweep(channels, torch.bfloat16):
        return
    kind, load, width = TABLES[op].Tile, KERNELS[op][kernel], sum(tiles.parts(channels))
    whole = kind._field_defaults["slice"]
    slices = (128, 256, whole) if channels > 256 and load.sums == 1 else (whole,)
    depths = (2, 3, 4) if channels <= 128 else (2, 3)
    orders: tuple[dict[str, Any], ...] = ({}, *ORDERS.get(kernel, ()))
    if op == "spatial_attention" and channels <= 128:
        orders = (*orders, {"registers": THREE_PROGRAMS})
    for (rows, warps), columns, stages, piece, order in product(
        ROWS_AND_WARPS, (16, 32, 64, 128), depths, slices, orders
    ):
        if "registers" in order and warps > 4:
            continue
        held = 2 * width * (load.rows * rows + load.columns * stages * columns)
        registers = load.sums * rows * min(width, piece) // (32 * warps)  # of a thread
        if held <= SHARED_MEMORY and registers <= 192 and rows * columns >= (2048 if channels <= 256 else 1024):
            yield Job(op, kernel, channels, kind(rows, columns, warps, stages, piece, **order))


def launcher(job: Job, device: str = "cuda") -> Launch:
    """Launches the kernel with this tile, on numbers that stay finite."""
    return {"spatial_attention": _attention, "codebook": _codebook}[job.op](job, device)


def _maps(count: int, images: int, channels: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(images, channels, SIDE, SIDE, device=device).bfloat16() for _ in range(count)]


def _attention(job: Job, device: str) -> Launch:
    q, k, g = map(features, _maps(3, 1, job.channels, device))
    statistics = torch.full((1, SIDE * SIDE, 2), 9.0, device=device)
    delta, out, scale = torch.zeros_like(statistics[..., 0]), features(torch.empty_like(k.data)), job.channels**-0.5
    attend = partial(attention._launch_attend, tile=job.tile)
    slopes = partial(attention._launch_slopes, tile=job.tile)
    return {
        "attend": partial(attend, q, k, g, out, statistics, scale, False),
        "attend shared": partial(attend, q, k, None, out, statistics, scale, False),
        "attend given": partial(attend, k, q, g, out, statistics, scale, True),
        "slopes": partial(slopes, q, g, k, q, statistics, delta, out, scale, False),
        "slopes shared": partial(slopes, k, None, q, g, statistics, delta, out, scale, True),
    }[job.kernel]


def _codebook(job: Job, device: str) -> Launch:
    student, teacher = _maps(2, IMAGES, job.channels, device)
    codes = torch.randn(CODES, job.channels, device=device).bfloat16()
    problem = codebook._Problem.of(student, teacher, codes, float(job.channels))
    count, scale = problem.positions, problem.scale
    loss, statistics = torch.empty(count, device=device), torch.ones(5, count, device=device)
    slopes = features(torch.empty_like(student, dtype=torch.float32))
    launch = partial(codebook._launch_rows, tile=job.tile)
    kernel = codebook._slopes if job.kernel == "slopes" else codebook._sweep
    return {
        "student": partial(launch, kernel, problem, "student", loss, statistics, slopes, count, scale, log(2), 1.0),
        "statistics": partial(launch, kernel, problem, "statistics", loss, statistics, None, count, scale, log(2), 1.0),
        "slopes": partial(launch, kernel, problem, "slopes", statistics, slopes, count, scale, 1.0, False),
    }[job.kernel]


def compiled(job: Job) -> Job | None:
    """Compiles without launching, into triton's cache on the disk; None where the compiler refuses."""
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    try:
        launcher(job)()
    except Exception:  # whatever a compiler raises: this candidate is no candidate
        return None
    finally:
        JITFunction.run = run
    return job


def main(op: str, counts: list[int]) -> None:
    cases = [(op, kernel, channels) for channels in counts for kernel in KERNELS[op]]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = list(pool.map(compiled, (job for case in cases for job in candidates(*case))))
    for case in cases:
        found = []
        for job in jobs:
            if job is None or job[:3] != case:
                continue
            launch = launcher(job)
            try:
                launch()
            except OutOfResources:  # more shared memory than was estimated
                continue
            found.append((median(on_device(launch, 0) for _ in range(ROUNDS)) * 1e3, job.tile))
        print(f"{op}, {case[1]}, {case[2]} channels:")
        for ms, tile in sorted(found):
            print(f"    {ms:.2f} ms {tile}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(argument) for argument in sys.argv[2:]])
