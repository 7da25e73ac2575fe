"""Memory that the process keeps from one operator of a training step to the next.

torch takes every tensor on a CPU from the C library. glibc gives blocks above 32 MiB back to the system as soon as they die, smaller
ones when they are the last of its heap, and the next operator asks for as much again: the system clears each page anew, at 1 to 2 us for
4 KiB, which is more than what most operators do with it. Steps repeat the same sizes, so kept blocks are used again, and the process
grows little. Whole images of many sizes would leave holes between them: around those, memory is given back.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h
KEPT, GIVEN_BACK = 2**30, 2**25
"""Bytes below which a block, and what is free at the end of the heap, stays with the process: ours for steps, and glibc's own limit."""
USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_keeps = False


def keep_memory() -> bool:
    """Keeps blocks below KEPT from now on; whether the C library does that.

    Nothing is changed with another library than glibc, and where the user has chosen a threshold in the environment.
    """
    global _keeps
    chosen = "_threshold" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in USERS)
    _keeps = not chosen and _set_limit(KEPT)
    return _keeps


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Within, large blocks go back to the system as they die, as they do without keep_memory(); so does what is free at the beginning."""
    global _keeps
    if not _keeps:
        yield
        return
    _keeps = not _set_limit(GIVEN_BACK)
    ctypes.CDLL(None).malloc_trim(0)
    try:
        yield
    finally:
        _keeps = _set_limit(KEPT)


def _set_limit(size: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(which, size) for which in (MMAP_THRESHOLD, TRIM_THRESHOLD))
