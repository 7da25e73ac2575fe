"""Builds the C++ kernels of csrc/ into kdops/_C.abi3.so, and those for CUDA into kdops/_C_cuda.abi3.so.

KDOPS_BUILD=auto (default) builds what this machine can build and installs without the rest; `cpu` or `cuda` (which includes cpu) must
succeed; `none` builds nothing. kdops/_build.json records what was built, or why it was not: kdops.info() shows it.

The extensions use libtorch's stable ABI, so that one file serves every Python from 3.11 and every torch from 2.11 on. They define no
Python module: torch.ops.load_library loads them, and they add implementations to operators that kdops declares.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    NO_TORCH = f"torch cannot be imported while building ({error})"
else:
    NO_TORCH = None

MODES = {"auto": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}  # what must succeed
HEADERS = glob("csrc/**/*.h", recursive=True)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-std=c++20", "-O3", "-g0"]  # of torch 2.11
# No -ffast-math. These two only say that nobody reads errno or the floating-point exception flags.
VECTORISED = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]

# Spellings of KDOPS_CLONES in csrc/common/simd.h, tried in this order.
CLONES = {
    1: '"arch=x86-64-v4", "arch=x86-64-v3", "default"',
    2: '"avx512f", "avx2", "default"',
}


class CannotBuild(Exception):
    """Why an extension cannot be built here."""


def mode() -> str:
    chosen = os.environ.get("KDOPS_BUILD", "auto")
    if chosen not in MODES:
        raise SystemExit(f"KDOPS_BUILD is {chosen!r}, but it must be one of {', '.join(MODES)}.")
    return chosen


def compiler() -> str:
    return os.environ.get("CXX", "c++")  # what torch's BuildExtension calls


def compile_error(code: str, *flags: str) -> str | None:
    """None when the C++ compiler makes a shared library of `code`, else what it said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        command = [*compiler().split(), *flags, "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]


def compiler_version() -> str:
    done = subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True)
    return (done.stdout or compiler()).splitlines()[0]


def clones() -> int:
    """The KDOPS_CLONES that this compiler knows; 0 for none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 0
    probe = "template <typename T> __attribute__((target_clones({}))) T twice(T x) {{ return 2 * x; }}\nint two = twice(1);\n"
    return next((n for n, targets in CLONES.items() if compile_error(probe.format(targets)) is None), 0)


def cpu_extension() -> tuple[Extension, dict[str, str]]:
    error = compile_error("#include <cstdint>\n", *STABLE_ABI, *VECTORISED)
    if error:
        raise CannotBuild(
            f"the C++ compiler {compiler()!r} does not work ({error}); install g++ or clang++, or set CXX"
        )
    chosen = clones()
    extension = CppExtension(
        "kdops._C",
        sorted(glob("csrc/*.cpp")),
        depends=HEADERS,
        extra_compile_args=[*STABLE_ABI, *VECTORISED, f"-DKDOPS_CLONES={chosen}"],
        py_limited_api=True,
    )
    return extension, {
        "compiler": compiler_version(),
        "vectors": CLONES.get(chosen, "baseline").replace('"', ""),
    }


def cuda_extension() -> tuple[Extension, dict[str, str]]:
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"nvcc does not run ({error}); set CUDA_HOME") from error
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"{nvcc} is of CUDA {release and release[1]}, but torch is built with CUDA {torch.version.cuda}"
        )
    if not torch.cuda.is_available():  # else BuildExtension compiles for the GPUs that it sees
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    extension = CUDAExtension(
        "kdops._C_cuda",
        sorted(glob("csrc/*.cu")),
        depends=HEADERS,
        extra_compile_args={"cxx": STABLE_ABI, "nvcc": [*STABLE_ABI, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]},
        py_limited_api=True,
    )
    return extension, {"compiler": version.strip().splitlines()[-2]}


class Build(BuildExtension):
    """Builds what it can, records why the rest is missing, and fails only when what was asked for is missing."""

    def finalize_options(self) -> None:
        self.record: dict[str, dict[str, object]] = {}
        self.distribution.ext_modules = []
        for name, make in (("cpu", cpu_extension), ("cuda", cuda_extension)):
            try:
                self.distribution.ext_modules.append(self.plan(name, make))
            except CannotBuild as error:
                self.skip(name, str(error))
        super().finalize_options()

    def run(self) -> None:
        folder = Path("kdops") if self.inplace else Path(self.build_lib, "kdops")
        super().run()
        for name, file in (("cpu", "_C.abi3.so"), ("cuda", "_C_cuda.abi3.so")):
            if not self.record[name]["built"]:
                (folder / file).unlink(missing_ok=True)  # of an earlier build
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps({"requested": mode(), **self.record}, indent=1) + "\n")

    def plan(self, name: str, make) -> Extension:
        if mode() == "none":
            raise CannotBuild("KDOPS_BUILD=none")
        if name == "cuda" and mode() == "cpu":
            raise CannotBuild("KDOPS_BUILD=cpu")
        if NO_TORCH:
            raise CannotBuild(NO_TORCH)
        extension, facts = make()
        self.record[name] = {"built": True, "torch": torch.__version__, **facts}
        return extension

    def skip(self, name: str, reason: str) -> None:
        if name in MODES[mode()]:
            raise SystemExit(f"KDOPS_BUILD={mode()} asks for the {name} extension, but {reason}.")
        print(f"kdops: no {name} extension: {reason}", file=sys.stderr)
        self.record[name] = {"built": False, "reason": reason}

    def build_extensions(self) -> None:
        wanted, built = self.extensions, []
        for extension in wanted:
            self.extensions = [extension]  # one at a time: torch's checks for CUDA must not stop the CPU extension
            try:
                super().build_extensions()
                built.append(extension)
            except Exception as error:
                name = "cuda" if extension.name.endswith("_cuda") else "cpu"
                what = str(error).strip().partition("\n")[0]
                self.skip(name, f"compiling it failed ({what}; the build log has the rest)")
        self.extensions = built


setup(
    # What there is to build is decided in Build.finalize_options; this tells setuptools that the package is not pure Python.
    ext_modules=[Extension("kdops._C", [], py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
