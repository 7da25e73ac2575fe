"""How benchmarks measure: providers interleaved in one process, so that a machine's mood hits all of them, and ratios of medians."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

Call = Callable[[], object]
LONGEST_LAUNCH = 5e-2  # seconds for which the device waits; work that takes longer hides its launches itself
SHORTEST_LAUNCH = 1e-4  # where none is known
CYCLES = 2e9  # of a GPU in a second, at most


def synchronised(call: Call, device: str) -> Call:
    """`call`, returning when its work is done and not when it is queued."""
    if device == "cpu":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider: median and the distance between the quartiles, on a GPU of the device's work alone.

    `host` is what a caller sees who waits for each call, launches and Python included; None where that is the same.
    """

    median: float
    spread: float
    host: float | None = None


def interleave(calls: Mapping[str, Call], rounds: int = 15, device: str = "cpu") -> dict[str, Timing]:
    """Time every call `rounds` times, in turn, after one warm-up each."""
    waiting = {name: synchronised(call, device) for name, call in calls.items()}
    for call in waiting.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in waiting.items():
            hosts[name].append(on_host(call))
            if device != "cpu":
                seconds[name].append(on_device(calls[name], min(hosts[name])))
    if device == "cpu":
        return {name: Timing(median(s), _spread(s)) for name, s in hosts.items()}
    return {name: Timing(median(s), _spread(s), median(hosts[name])) for name, s in seconds.items()}


def _spread(seconds: Sequence[float]) -> float:
    return quantiles(seconds)[2] - quantiles(seconds)[0]


def on_host(call: Call) -> float:
    """Seconds until the call returns.

    Its result is given back after the clock has stopped: giving back the last memory of a heap also gives back what others left below it.
    """
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


@cache
def _larger_than_cache() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def on_device(call: Call, launching: float) -> float:
    """Seconds of the device's work, with a cold cache.

    The device is kept busy for the seconds that launching takes, so that it finds all kernels queued: the gaps between launches, which
    a training step hides, do not count. Where it had begun before all were queued, it is kept busy for twice as long, and again.
    """
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_cache().zero_()
        torch.cuda._sleep(int(min(launching, LONGEST_LAUNCH) * CYCLES))
        start.record()
        result = call()
        end.record()
        late = start.query()
        torch.cuda.synchronize()
        del result
        if not late or launching >= LONGEST_LAUNCH:
            return start.elapsed_time(end) / 1e3
        launching = 2 * launching or SHORTEST_LAUNCH


def peak_bytes(call: Call, device: str) -> int:
    """By how much memory rises above what is held before the call, at its highest, results included.

    On CUDA this is the allocator's count. On a CPU it is the peak of the resident set, which the kernel lets a process reset
    (/proc/self/clear_refs) once malloc has given back what it hoards: it sees the scratch of every library, not only torch's tensors.
    A warm-up keeps first-time costs (threads, loaded code) out.
    """
    call()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    held = _resident("VmRSS")
    call()
    return _resident("VmHWM") - held


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {key}"
    return int(found[1]) * 1024


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def relative_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of any tensor, relative to that tensor's largest entry."""
    return max(float((g.double() - t).abs().max() / t.abs().max()) for g, t in zip(got, truth, strict=True))
