"""Blocks that a training process keeps: the next ones need no pages, but around whole images and where the user has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SIZE = 2**26  # bytes: above glibc's own limit
PAGES = SIZE // 4096
CODE = f"""
import resource
from trainers.memory import keep_memory, memory_given_back

size = {SIZE}  # not a constant: Python would make those once

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        b"1" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keeps = keep_memory()
b"1" * size
steps = faults()
with memory_given_back():
    with memory_given_back():
        inner = faults()
    images = faults()
b"1" * size
print(int(keeps), steps, inner, images, faults())
"""


def run(**chosen: str) -> list[int]:
    """Whether memory is kept, and the pages that four blocks took from the system: in steps, twice around images, in steps again."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | chosen
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="keeps memory by glibc's mallopt, which this system does not have")
def test_steps_use_the_same_blocks_again() -> None:
    keeps, steps, inner, images, after = run()
    if not keeps:
        pytest.skip("this C library has no mallopt")
    assert max(steps, after) < PAGES // 4
    assert min(inner, images) >= 3 * PAGES


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_MMAP_THRESHOLD_": "33554432"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}]
)
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    keeps, steps, *_ = run(**chosen)
    assert keeps == 0
    assert steps >= 3 * PAGES
