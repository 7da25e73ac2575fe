"""Selection of backends, and what the package says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdops
from kdops.dispatch import BACKENDS, SPECS


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_explain_is_what_happens() -> None:
    """Every backend that says yes runs, every one that says no raises with that very reason, and auto takes the one it names."""
    x = torch.randn(2, 3)
    for name in ("pairwise_distance",):
        said = kdops.explain(name, x, x)
        assert set(said) == set(BACKENDS)
        assert next(iter(said.values())) == "yes (chosen)"
        for backend, verdict in said.items():
            if verdict.startswith("yes"):
                assert SPECS[name].function(x, x, backend=backend).shape == (2, 2)
            else:
                with pytest.raises(RuntimeError) as raised:
                    SPECS[name].function(x, x, backend=backend)
                assert verdict.removeprefix("no: ") in str(raised.value)


def test_explain_of_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="pairwise_distance"):
        kdops.explain("pairwise", torch.zeros(1, 1))
    with pytest.raises(ValueError, match="no tensor"):
        kdops.explain("pairwise_distance", 3)


def test_context_forces_and_restores() -> None:
    before = kdops.info()["default_backend"]
    with kdops.backend("reference"):
        assert kdops.info()["default_backend"] == "reference"
        with pytest.raises(RuntimeError, match="'cuda' was asked for"):  # an argument is stronger than the context
            kdops.pairwise_distance(torch.zeros(1, 1), torch.zeros(1, 1), backend="cuda")
    assert kdops.info()["default_backend"] == before
    with pytest.raises(ValueError, match="no such backend"), kdops.backend("gpu"):
        pass


def test_context_belongs_to_its_thread() -> None:
    seen = []
    with kdops.backend("reference"):
        other = threading.Thread(target=lambda: seen.append(kdops.info()["default_backend"]))
        other.start()
        other.join()
    assert seen == ["auto"]


def test_environment_sets_the_default() -> None:
    said = python("import kdops; print(kdops.info()['default_backend'])", KDOPS_BACKEND="reference")
    assert said.stdout.strip() == "reference"
    refused = python("import kdops", KDOPS_BACKEND="fast")
    assert refused.returncode != 0
    assert "KDOPS_BACKEND is 'fast'" in refused.stderr


def test_cuda_goes_before_triton_where_an_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdops.dispatch, "MISSING_CUDA", None)
    monkeypatch.setattr(kdops.dispatch, "HAVE_TRITON", True)
    with FakeTensorMode():
        image, row = torch.empty(1, 1, 8, 8, device="cuda"), torch.empty(1, 8, device="cuda")
        assert kdops.dispatch.choose("mscn", [image]).name == "cuda"
        assert kdops.dispatch.choose("gaussian_distance", [row, row]).name == "triton"
        assert kdops.dispatch.choose("mscn", [image.double()]).name == "reference"


def test_info_names_every_backend() -> None:
    told = kdops.info()
    for backend in BACKENDS:
        assert told[backend].startswith(("available", "not available: "))


def test_import_is_light() -> None:
    """Nothing heavy comes with the package: triton, the trainer's libraries and torchvision are for those who call them."""
    code = "import sys, kdops; print([m for m in ('triton', 'torchvision', 'lightning_fabric', 'pydantic', 'einops') if m in sys.modules])"
    plain = python("import sys, torch; print([m for m in ('triton', 'torchvision') if m in sys.modules])")
    assert python(code).stdout == plain.stdout == "[]\n"
