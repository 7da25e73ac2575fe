"""What this machine is and how fast it can be: the floors that benchmark rows are held against."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

CORES_PER_MULTIPROCESSOR = 128  # float32 instructions that a multiprocessor of sm_80 to sm_100 starts in a clock


@dataclass(frozen=True)
class Peaks:
    """What was measured here, per second: bytes of a copy, and FLOPs of a large matrix product in one dtype and of plain instructions."""

    bytes: float
    matrix: float
    vector: float

    def floor(self, moved: int, done: int, unit: str) -> float:
        """Seconds below which no implementation can go: the slower of moving the bytes and doing the FLOPs ("matrix" or "vector")."""
        return max(moved / self.bytes, done / getattr(self, unit))


@cache
def peaks(device: str, dtype: torch.dtype) -> Peaks:
    """Measured once a process, best of a few: a floor is what the hardware can do, not what it did on average."""
    large = torch.zeros(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(large)
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    matrix = 2 * n**3 / _seconds(lambda: torch.mm(a, a), device)
    return Peaks(2 * large.numel() / _seconds(lambda: target.copy_(large), device), matrix, _vector(device, matrix))


def _vector(device: str, matrix: float) -> float:
    """Instructions that are no fused multiply-add do one FLOP where that does two."""
    if device == "cpu":
        return matrix / 2
    query = [
        "nvidia-smi",
        "--id=0",
        "--query-gpu=clocks.max.sm",
        "--format=csv,noheader,nounits",
    ]  # torch needs pynvml for it
    megahertz = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    return torch.cuda.get_device_properties(0).multi_processor_count * CORES_PER_MULTIPROCESSOR * megahertz * 1e6


def _seconds(call: Callable[[], object], device: str) -> float:
    """Of one call: the fastest of five groups."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    repeats = 3 if device == "cpu" else 20
    found = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        found.append((time.perf_counter() - start) / repeats)
    return min(found[1:])


@cache
def name(device: str) -> str:
    """A short name of this kind of machine, which is also the name of the file that holds its results: `amd-epyc-2-cores`."""
    if device != "cpu":
        return _slug(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return _slug(f"{found[1] if found else platform.machine()} {torch.get_num_threads()} cores")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@cache
def versions() -> str:
    """Of what decides the speed: torch, and triton where it is."""
    try:
        import triton
    except ImportError:
        return f"torch {torch.__version__}"
    return f"torch {torch.__version__}, triton {triton.__version__}"
