"""The CUDA kernels without a GPU: compiled by the C++ compiler, with a thread of the process for each thread of a block.

What this finds are wrong indices, barriers that are missing and numbers that are used before they are written; not what only a GPU does
(its approximate quotient, its memory's order, its speed).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_contract import FLOOR

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent / "cuda_on_cpu"
FILES = ("contrast", "nss")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What checks.py prints, in a copy of the package whose C++ backend is made of the CUDA files."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "kdops", folder / "kdops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for header in ("launch.h", "fragments.h"):
        shutil.copy(HERE / header, folder / "csrc" / "common" / header)
    include, lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    flags = [
        "-O1",
        "-std=c++20",
        "-fPIC",
        "-w",
        "-pthread",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{include}",
    ]
    compiling = []
    for name in FILES:
        text = (folder / "csrc" / f"{name}.cu").read_text()
        source = folder / "csrc" / f"{name}_cu.cpp"
        source.write_text(
            text.replace("STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m)")
        )
        compiling.append(subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]))
    assert [process.wait() for process in compiling] == [0] * len(FILES)
    objects = [str(folder / "csrc" / f"{name}_cu.o") for name in FILES]
    libraries = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    extension = str(folder / "kdops" / "_C.abi3.so")
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", extension, *libraries], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    checks = [sys.executable, "-P", str(HERE / "checks.py")]
    done = subprocess.run(checks, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_the_checks_cover_every_cuda_file() -> None:
    assert sorted(path.stem for path in (ROOT / "csrc").glob("*.cu")) == sorted(FILES)


def test_kernels_match_float64(errors: dict[str, float]) -> None:
    """Clause 1 of the contract."""
    errors = {case: error for case, error in errors.items() if "weight" not in case}
    bounds = {case: FLOOR[torch.bfloat16 if "float16" in case else torch.float32] for case in errors}
    assert len(errors) > 30
    assert {case: error for case, error in errors.items() if not error <= bounds[case]} == {}


def test_ties_alone_have_no_gradient(errors: dict[str, float]) -> None:
    assert errors["nothing but ties"] == errors["signs, nothing but ties"] == 0


def test_a_gradient_has_the_same_bits_whoever_else_needs_one(errors: dict[str, float]) -> None:
    assert errors["same bits for one gradient"] == errors["signs, same bits for one gradient"] == 0


def test_weights_of_signs_keep_twelve_bits_of_the_largest_of_a_row(errors: dict[str, float]) -> None:
    """Each is rounded by at most 2^-12 of the largest, their sum by about the root of their number times that; bfloat16 errs by 2^-9."""
    assert errors["signs, weights"] < 2**-11
    assert errors["signs, weights of each row"] < 2**-11
    assert errors["signs, weights of 0"] == 0


def test_a_weight_that_is_not_finite_stays_in_its_rows(errors: dict[str, float]) -> None:
    assert errors["signs, a weight that is not finite"] == 0
