"""Every Triton kernel compiles for GPUs of three generations (and AMD's), fits their shared memory and spills no register.

The slow test compiles for all of them, the others for sm_90, mostly one dtype and count of channels.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}  # KiB that one program may use
# ptxas of triton 3.6 saves two registers of one half-precision kernel (sm_80, rows not aligned) to fit one more program.
SPILLS = 0 if importlib.metadata.version("triton") >= "3.8" else 8

# What multiplies tiles of 16-bit numbers on each target.
MATRIX = {"cuda:80": "mma.sync", "cuda:90": "wgmma.mma_async", "cuda:100": "tcgen05.mma", "hip:gfx942": "v_mfma"}

TARGETS = set(SHARED_MEMORY) - (set() if importlib.util.find_spec("triton.backends.amd") else {"hip:gfx942"})

Records = list[dict[str, Any]]


def compiled(folder: Path, *options: str) -> Records:
    """What tests/aot.py says, in a process of its own: kernels made for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "aot.py", *options]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Compiled once in a run of the tests, by the first of its processes that asks; the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    found = folder / "aot.json"
    with (folder / "aot.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(compiled(tmp_path_factory.mktemp("triton"))))
    return json.loads(found.read_text())


# Bytes that single variants spill: float32 rows that are not aligned; a program's sums in two parts; tiles that were measured to be the
# fastest although they spill.
KNOWN_SPILLS = {
    ("contrast", "_distances", "cuda:90", "float32", None): 24,
    ("contrast", "_distances", "cuda:80", "float32", None): 8,
    ("affinity", "_tile_gradients", "cuda:100", "bfloat16", 64): 8,
    **{("spatial_attention", "_slopes", "cuda:90", dtype, 256): 80 for dtype in ("bfloat16", "float16")},
    **{("spatial_attention", "_attend", "cuda:90", dtype, 384): 32 for dtype in ("bfloat16", "float16")},
}


def spills_allowed(record: dict[str, Any]) -> float:
    """docs/performance/ has what does spill: spatial attention of many 16-bit channels; a few numbers of float32 operands."""
    variant = (record["op"], record["kernel"], record["target"], record["dtypes"][0], record["constants"].get("C"))
    return max(KNOWN_SPILLS.get(variant, 0), _spills_of_kernel(record))


def _spills_of_kernel(record: dict[str, Any]) -> float:
    if record["op"] not in ("channel_attention", "codebook", "spatial_attention") or record["kernel"] == "_delta":
        return SPILLS
    if record["dtypes"][0] == "float32":
        return 64
    if record["kernel"] in ("_sweep", "_slopes") and (record["op"], record["target"]) == ("codebook", "cuda:90"):
        return 128  # measured: with a few numbers spilled its tiles are faster than the largest that spill none
    if record["kernel"] == "_mix" and record["target"] == "cuda:90" and not record["constants"]["WHOLE"]:
        return 128  # measured likewise: 0.74 ms with 96 bytes spilled, 1.03 ms with none
    hopper, own = record["target"] == "cuda:90", {"values", "row_values"} & set(record["absent"])
    most = 192 if not hopper else 512 if own and record["kernel"] == "_attend" else 256
    return float("inf") if record["op"] == "spatial_attention" and record["constants"]["C"] > most else SPILLS


def problems(records: Records) -> Records:
    """The kernels that do not compile, spill, or do not fit."""
    return [
        record
        for record in records
        if "error" in record
        or record["spills"] > spills_allowed(record)
        or record["shared"] > SHARED_MEMORY[record["target"]] * 1024
        or record["registers"] == 0
    ]


def test_kernels_compile_fit_and_do_not_spill(records: Records) -> None:
    assert not problems(records)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_variant_compiles_fits_and_does_not_spill(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--all")
    assert not problems(found)
    check_that_nothing_is_left_out(found, TARGETS)


def test_every_kernel_of_every_op_is_compiled(records: Records) -> None:
    check_that_nothing_is_left_out(records, {"cuda:90"})


def check_that_nothing_is_left_out(records: Records, targets: set[str]) -> None:
    ops = {path.parent.name for path in (ROOT / "kdops").glob("*/triton*.py")}
    assert {record["op"] for record in records} == ops, "add the op to OPS in tests/aot.py"
    for op in ops:
        source = "".join(path.read_text() for path in (ROOT / "kdops" / op).glob("triton*.py"))
        functions = re.findall(r"@triton\.jit[^\n]*\ndef (\w+)", source)
        kernels = {name for name in functions if len(re.findall(rf"\b{name}\(", source)) == 1}  # others call the rest
        for target in targets:
            seen = {r["kernel"] for r in records if r["op"] == op and r["target"] == target}
            assert seen == kernels, f"{op} on {target}: tests/aot.py calls no launcher of {kernels - seen}"


def test_products_of_tiles_use_matrix_instructions(records: Records) -> None:
    names = ("_attend", "_slopes", "_grams", "_mix")
    sweeps = [r for r in records if r["kernel"] in names and r["dtypes"][0] != "float32"]
    assert sweeps
    for record in sweeps:
        assert record["matrix"].get(MATRIX[record["target"]]), record


@pytest.mark.parametrize(
    "change",
    [{"error": "CompilationError"}, {"spills": SPILLS + 8}, {"shared": 300 * 1024}],
    ids=["error", "spill", "shared"],
)
def test_a_bad_kernel_is_noticed(records: Records, change: dict[str, Any]) -> None:
    strict = next(record for record in records if spills_allowed(record) == SPILLS)
    assert problems([strict | change])
