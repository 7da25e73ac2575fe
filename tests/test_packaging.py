"""Building: what is built is portable, and what cannot be built is said and does not stop an installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "kdops" / "_C.abi3.so"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

needs_extension = pytest.mark.skipif(not EXTENSION.exists(), reason="the CPU extension is not built")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads, without anything built."""
    for name in ("kdops", "trainers", "csrc"):
        built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True)


def record(checkout: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((checkout / "kdops" / "_build.json").read_text())
    return result


def info_without_extension(checkout: Path) -> str:
    """What kdops.info() of the checkout says about the CPU, after a distance on the backend that `auto` chooses."""
    program = (
        "import torch, kdops\n"
        "assert kdops.pairwise_distance(torch.ones(2, 3), torch.zeros(1, 3)).tolist() == [[1.0], [1.0]]\n"
        "print(kdops.info()['cpu'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_none_works_on_the_reference_backend_and_says_why(checkout: Path) -> None:
    (checkout / "kdops" / "_C.abi3.so").write_text("left over from an earlier build")
    done = build(checkout, KDOPS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert record(checkout)["cpu"] == {"built": False, "reason": "KDOPS_BUILD=none"}
    assert not (checkout / "kdops" / "_C.abi3.so").exists()
    assert "KDOPS_BUILD=none" in info_without_extension(checkout)


def failing_compiler(folder: Path, works_for: str) -> str:
    """A compiler that works for command lines with `works_for` and fails for all others."""
    script = folder / "failing-c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{works_for}*) exec c++ "$@";; esac\necho "out of order" >&2\nexit 1\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("compiler", ["missing", "broken", "breaks half-way"])
def test_a_compiler_that_fails_is_recorded_by_auto(checkout: Path, compiler: str) -> None:
    works_for = {"broken": "--version", "breaks half-way": "probe.cpp"}
    path = "/nonexistent/c++" if compiler == "missing" else failing_compiler(checkout, works_for[compiler])
    done = build(checkout, KDOPS_BUILD="auto", CXX=path)
    assert done.returncode == 0, done.stderr
    cpu = record(checkout)["cpu"]
    assert not cpu["built"]
    assert ("set CXX" if compiler != "breaks half-way" else "failed") in cpu["reason"]
    assert cpu["reason"] in info_without_extension(checkout)


def test_a_compiler_that_is_asked_for_must_work(checkout: Path) -> None:
    done = build(checkout, KDOPS_BUILD="cpu", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "KDOPS_BUILD=cpu asks for the cpu extension" in done.stderr
    assert "set CXX" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_cuda_that_is_asked_for_must_be_there(checkout: Path) -> None:
    done = build(checkout, KDOPS_BUILD="cuda")
    assert done.returncode != 0
    assert "built without CUDA" in done.stderr


def test_an_unknown_mode_names_the_known_ones(checkout: Path) -> None:
    done = build(checkout, KDOPS_BUILD="gpu")
    assert done.returncode != 0
    assert "KDOPS_BUILD is 'gpu', but it must be one of auto, cpu, cuda, none" in done.stderr


def undefined_symbols(path: Path) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    command = [nm, "--dynamic", "--undefined-only", "--demangle", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if " U " in line]


@needs_extension
def test_the_extension_uses_only_the_stable_abi() -> None:
    symbols = undefined_symbols(EXTENSION)
    assert any("aoti_torch_" in name for name in symbols)  # nm was understood
    assert [name for name in symbols if re.search(r"\b(c10|at|torch|Py\w*)::|\bPy_?[A-Z]", name)] == []


@needs_extension
@pytest.mark.parametrize("first", ["extension", "schemas"])
def test_the_extension_may_be_loaded_before_or_after_the_schemas(first: str) -> None:
    load = f"torch.ops.load_library({str(EXTENSION)!r})"
    steps = [load, "import kdops"] if first == "extension" else ["import kdops.registration", load, "import kdops"]
    program = "\n".join(
        [
            "import torch",
            *steps,
            "assert torch.ops.kdops.pairwise_distance(torch.ones(2, 3), torch.zeros(1, 3), 1).sum() == 6",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_files_compile_without_spills(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command = [
        nvcc,
        *flags,
        "-Xptxas=-v",
        "-Xcompiler=-fPIC",
        f"-I{TORCH_INCLUDE}",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "out.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert usage, done.stderr
    assert set(usage) == {("0", "0", "0")}, done.stderr  # a stack frame is an array that did not fit registers


@pytest.mark.slow
def test_an_isolated_editable_installation_builds_the_extension(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """pip makes its own build environment, as on a user's machine; the dependencies come from the environment of this test."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True, system_site_packages=False)
    python = home / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "-e", str(checkout)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert record(checkout)["cpu"]["built"]
    Path(packages, "tests.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    program = "import kdops; print(kdops.__file__, kdops.info()['cpu'])"
    done = subprocess.run([python, "-c", program], cwd=home, capture_output=True, text=True)
    assert done.stdout.strip() == f"{checkout / 'kdops' / '__init__.py'} available", done.stderr
