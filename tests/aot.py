"""Compile every Triton kernel for GPUs that are not there, exactly as its launcher would, and print what each costs.

The launchers run on meta tensors; where they would launch, the kernel is compiled for each target instead. So the arguments, their
alignment and the constants are those of real launches. An op joins by adding a function to OPS.

    python tests/aot.py [--all]     one JSON object for each kernel and target; must run without TRITON_INTERPRET

Without --all only some calls, and for sm_90 alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("cuda", 80, 32)]
if "amd" in backends:
    TARGETS.append(GPUTarget("hip", "gfx942", 64))

Calls = Iterator[Callable[[], Any]]


CHANNELS = (48, 64, 128, 180, 256, 384, 512)  # of feature maps in practice


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def contrast(everything: bool) -> Calls:
    from kdops.contrast import triton as ops

    def calls(b: int, k: int, f: int, dtype: torch.dtype, p: int) -> Calls:
        x, y, grad = empty(b, f, dtype=dtype), empty(k, f, dtype=dtype), empty(b, k)
        yield lambda: ops.pairwise_distance(x, y, p)
        yield lambda: ops.pairwise_distance_backward(grad, x, y, p, True, True)
        yield lambda: ops.pairwise_distance_backward(grad, x, y, p, True, False)
        if b == k:
            yield lambda: ops.pairwise_distance(x, None, p)

    pairs = [(16, 16), (4, 4), (1, 1), (1, 16), (16, 4), (4, 16), (16, 1), (4, 1), (1, 4)]
    for b, k in pairs if everything else pairs[:5]:
        yield from calls(b, k, 147456, torch.bfloat16, 1)
        yield from calls(b, k, 147456, torch.float32, 2)
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if everything else ():
            for p in (1, 2):
                yield from calls(b, k, 147456, dtype, p)
                yield from calls(b, k, 4099, dtype, p)
    yield from calls(16, 16, 147456, torch.float32, 1)
    yield from calls(16, 16, 4099, torch.float32, 1)  # rows that are not aligned
    yield from calls(16, 16, 1, torch.float16, 2)


def spatial_attention(everything: bool) -> Calls:
    from kdops.spatial_attention import triton as ops

    def calls(c: int, dtype: torch.dtype, value: bool) -> Calls:
        """Forward and backward: the teacher queries, or the student does and is its own value."""
        x, y, statistics = empty(2, c, 64, 64, dtype=dtype), empty(2, c, 64, 64, dtype=dtype), empty(2, 4096, 2)
        logits = empty(0)
        v = x if value else None
        yield lambda: ops.spatial_attention(x, y, v, None, False)
        yield lambda: ops.spatial_attention_backward(
            x, x, y, v, x, statistics, logits, None, False, value, not value, value
        )

    yield from calls(180, torch.bfloat16, value=False)
    yield from calls(180, torch.float32, value=False)
    for c in CHANNELS if everything else ():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from calls(c, dtype, value=False)
            yield from calls(c, dtype, value=True)


def gaussian(everything: bool) -> Calls:
    from kdops.gaussian import triton as ops

    def calls(b: int, features: tuple[int, ...], dtype: torch.dtype, sigma: list[float] | None) -> Calls:
        x, y = ([empty(b, f, dtype=dtype) for f in features] for _ in range(2))
        count = len(features)
        grad, slope = empty(count, b, dtype=dtype), empty(count, b)
        for reduction in range(3):
            yield partial(ops.gaussian_distance, x, y, sigma, True, reduction)
        yield lambda: ops.gaussian_distance_backward(grad, slope, x, y, [True] * count, [False] * count)
        yield lambda: ops.gaussian_distance_backward(grad, slope, x, y, [True] * count, [True] * count)

    pyramid = (1048576, 262144, 65536, 16384, 4096)
    yield from calls(8, pyramid, torch.bfloat16, [1.0] * 5)
    yield from calls(8, pyramid[:1], torch.float32, None)
    yield from calls(8, (4099, 1, 147456), torch.float16, None)  # rows that are not aligned
    for taps in (1, 2, 3, 4, 6, 8, 12, 16) if everything else ():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield from calls(16, (147456,) * taps, dtype, [1.0] * taps)


def codebook(everything: bool) -> Calls:
    from kdops.codebook import triton as ops

    def calls(d: int, dtype: torch.dtype) -> Calls:
        """Forward with the slopes of both networks, and the gradient of the codebook."""
        x, codes, count = empty(4, d, 32, 32, dtype=dtype), empty(1024, d, dtype=dtype), 4096
        statistics, none, grad = empty(5, count), empty(0), empty(count)
        yield lambda: ops.codebook_cross_entropy(x, x, codes, 1.0, True, True)
        yield lambda: ops.codebook_cross_entropy_backward(
            grad, x, x, codes, statistics, none, none, 1.0, False, False, True
        )

    def forward(d: int, dtype: torch.dtype) -> Calls:
        x, codes = empty(4, d, 32, 32, dtype=dtype), empty(1024, d, dtype=dtype)
        yield lambda: ops.codebook_cross_entropy(x, x, codes, 1.0, False, False)

    yield from calls(180, torch.bfloat16)
    yield from forward(180, torch.float32)
    yield from forward(64, torch.float16)
    for d in CHANNELS if everything else ():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from calls(d, dtype)


def nss(everything: bool) -> Calls:
    from kdops.nss import triton as ops

    def calls(image: Tensor, window: int, replicate: bool) -> Calls:
        options = (window, window / 6, 1.0, replicate)
        grad = empty(*image.shape)
        yield lambda: ops.mscn(image, *options)
        if image.dtype == torch.float32:  # others are converted before
            yield lambda: ops.mscn_backward(grad, grad, image, grad, grad, *options)
            yield lambda: ops.mscn_backward(grad, None, image, grad, grad, *options)

    for dtype in (torch.float32, torch.bfloat16, torch.float16) if everything else (torch.float32, torch.bfloat16):
        for replicate in (False, True):
            yield from calls(empty(4, 1, 512, 512, dtype=dtype), 7, replicate)
            yield from calls(empty(2, 3, 127, 61, dtype=dtype), 31, replicate)  # rows that are not aligned


def channel_attention(everything: bool) -> Calls:
    from kdops.channel_attention import triton as ops
    from kdops.channel_attention import triton_distance as distances

    def calls(c: int, dtype: torch.dtype) -> Calls:
        """In both forms of distillation: the teacher queries and is the target, or all inputs are different and trained."""
        x, y, other, target = (empty(16, c, 128, 128, dtype=dtype) for _ in range(4))
        attention, grad, close = empty(16, 1, c, c), empty(16, dtype=dtype), empty(16, dtype=torch.int32)
        forms = ((None, x, (False, True, False, False)), (other, target, (True,) * 4))
        for value, wanted, needed in forms if everything else forms[:1]:
            yield lambda value=value, wanted=wanted: distances.channel_attention_distance(
                x, y, value, wanted, None, 1, True
            )
            one_chunk = [t if t is None else t[..., :32, :32] for t in (x, y, value, wanted)]
            yield lambda maps=one_chunk: distances.channel_attention_distance(*maps, None, 1, True)
            yield lambda value=value, wanted=wanted, needed=needed: distances.channel_attention_distance_backward(
                grad, attention, attention, close, x, y, value, wanted, None, 1, True, *needed
            )
            yield lambda value=value: ops.channel_attention(x, y, value, None, 1)
            yield lambda value=value, needed=needed: ops.channel_attention_backward(
                x, attention, x, y, value, None, 1, *needed[:3]
            )

    for c in CHANNELS if everything else (180,):
        for dtype in (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,):
            yield from calls(c, dtype)


def affinity(everything: bool) -> Calls:
    from kdops.affinity import triton as ops

    def calls(c: int, dtype: torch.dtype, p: int) -> Calls:
        student, teacher, grad = empty(2, c, 64, 64, dtype=dtype), empty(2, 64, 64, 64, dtype=dtype), empty(2)
        grams = empty(2, c + 64, c + 64, dtype=torch.float64)
        yield lambda: ops.affinity_distance(student, teacher, p, 1e-8)
        yield lambda: ops.affinity_distance_backward(grad, grams, student, teacher, p, 1e-8, True, False)

    for c in CHANNELS if everything else (180,):
        for dtype in (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,):
            for p in (1, 2):
                yield from calls(c, dtype, p)
    if everything:  # p=2 with few positions goes by tiles
        few = [empty(2, 64, 8, 8, dtype=torch.bfloat16) for _ in range(2)]
        yield lambda: ops.affinity_distance(*few, 2, 1e-8)
        yield lambda: ops.affinity_distance_backward(empty(2), empty(0), *few, 2, 1e-8, True, True)


OPS: dict[str, Callable[[bool], Calls]] = {
    "codebook": codebook,
    "contrast": contrast,
    "gaussian": gaussian,
    "nss": nss,
    "spatial_attention": spatial_attention,
    "channel_attention": channel_attention,
    "affinity": affinity,
}


class _Driver:
    """Enough of a driver for the compiler to believe in a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return TARGETS.index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def matrix_instructions(text: str) -> dict[str, int]:
    """How often each kind stands in the PTX or AMD assembly."""
    kinds = Counter(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma", text))
    return dict(sorted(kinds.items()))


def cost(target: GPUTarget, compiled: Any) -> dict[str, Any]:
    """Registers of a thread, bytes that it spills to memory, bytes of shared memory of a program, and its matrix instructions."""
    text = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    shared = {"shared": compiled.metadata.shared, "matrix": matrix_instructions(text)}
    if target.backend == "hip":  # scalar registers that spill into vector registers touch no memory and are not counted
        found = re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", compiled.asm["amdgcn"])
        counts = {name: int(value) for name, value in found}
        return {"registers": counts["vgpr_count"], "spills": counts["private_segment_fixed_size"], **shared}
    suffix = "a" if target.arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(compiled.asm["ptx"])
        command = [
            get_ptxas(target.arch).path,
            "-v",
            f"-arch=sm_{target.arch}{suffix}",
            "kernel.ptx",
            "-o",
            "kernel.cubin",
        ]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return {"registers": int(re.findall(r"Used (\d+) registers", said)[0]), "spills": spills, **shared}


def records(everything: bool) -> Iterator[dict[str, Any]]:
    """Each different kernel that the calls of OPS launch, on each target; with "error" where it does not compile."""
    launched: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
    compile_as_launched = JITFunction.run

    def note(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append((kernel, args, kwargs))

    for target in TARGETS if everything else TARGETS[:1]:
        driver.set_active(_Driver(target))  # launchers ask it for the architecture, to choose their tiles
        seen = set()
        for op, calls in OPS.items():
            launched.clear()
            JITFunction.run = note
            for call in calls(everything):
                call()
            JITFunction.run = compile_as_launched
            for kernel, args, kwargs in launched:
                record = {"op": op, "kernel": kernel.__name__, "target": f"{target.backend}:{target.arch}"}
                constants = {p.name: a for p, a in zip(kernel.params, args, strict=False) if p.is_constexpr}
                absent = [p.name for p, a in zip(kernel.params, args, strict=False) if a is None]
                tensors = [a[0] if isinstance(a, tuple) else a for a in args]
                dtypes = [str(a.dtype).removeprefix("torch.") for a in tensors if isinstance(a, Tensor)]
                try:
                    compiled = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
                    if compiled.hash in seen:
                        continue
                    seen.add(compiled.hash)
                    result = cost(target, compiled)
                except Exception as error:
                    result = {"error": f"{type(error).__name__}: {error}"}
                yield record | {"dtypes": dtypes, "constants": constants, "absent": absent} | result


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    for found in records(everything="--all" in sys.argv):
        print(
            json.dumps(found, default=lambda constant: constant.value), flush=True
        )  # a tl.constexpr among the constants
