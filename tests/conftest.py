"""What all tests share. Set before kdops and triton are imported: without a GPU, Triton kernels run in its interpreter."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest


def digest_of_package() -> str:
    """Of all that kdops is made of in Python."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "kdops").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Code that torch.compile keeps on the disk knows an operator by its name alone: what an older kdops gave other shapes would fail.
torch.compiler.config.cache_key_tag = digest_of_package()


def patch_language_once() -> None:
    """Triton's interpreter replaces the functions of `tl` at each call of a function by a kernel, half of the time of an interpreted test.

    Nothing here needs the original ones back, so once for each module that holds kernels is enough.
    """
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, set()

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            original(fn)
        return interpreter._LangPatchScope()  # of nothing to put back

    interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_language_once()

# The same examples on every machine and run: a failure in CI is the failure at home. `--hypothesis-seed=random` explores.
hypothesis.settings.register_profile("kdops", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("kdops")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless asked for; skip GPU tests where there is no GPU."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights that is not part of the project."""
    path = Path(os.environ.get("KDOPS_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}: set KDOPS_SHARED to the folder that holds data/")
    return path


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: what a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
