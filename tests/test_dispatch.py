"""Selection of backends, and what the package says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
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


def test_explain_finds_tensors_by_keyword_and_in_lists() -> None:
    """A dtype that the kernels refuse says whether a tensor was looked at."""
    x, y = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.float8_e4m3fn)
    by_name = kdops.explain("affinity_distance", student=x, teacher=y)
    assert by_name == kdops.explain("affinity_distance", x, y) == kdops.explain("affinity_distance", [x, y])
    assert "float8_e4m3fn is not among" in by_name["reference"]


def test_context_forces_and_restores() -> None:
    before = kdops.info()["default_backend"]
    with kdops.backend("reference"):
        assert kdops.info()["default_backend"] == "reference"
        with pytest.raises(RuntimeError, match="'cuda' was asked for"):  # an argument is stronger than the context
            kdops.pairwise_distance(torch.zeros(1, 1), torch.zeros(1, 1), backend="cuda")
    assert kdops.info()["default_backend"] == before
    with pytest.raises(ValueError, match="no such backend"), kdops.backend("gpu"):
        pass


def test_context_restores_what_was_set_around_it_after_an_error_too() -> None:
    with kdops.backend("reference"):
        with pytest.raises(ZeroDivisionError), kdops.backend("cpu"):
            raise ZeroDivisionError
        assert kdops.info()["default_backend"] == "reference"
    assert kdops.info()["default_backend"] == "auto"


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
        monkeypatch.setattr(kdops.dispatch, "MISSING_CUDA", "nobody built it")
        assert kdops.dispatch.choose("mscn", [image]).name == "triton"


def test_without_the_extension_the_reference_runs_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Triton's interpreter, which is here in tests."""
    monkeypatch.setattr(kdops.dispatch, "MISSING_CPU", "nobody built it")
    x = torch.randn(2, 3)
    assert kdops.dispatch.choose("pairwise_distance", [x, x]).name == "reference"
    with pytest.raises(RuntimeError, match="cannot run because nobody built it"):
        kdops.pairwise_distance(x, x, backend="cpu")
    assert kdops.info()["cpu"].startswith("not available: nobody built it")


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    monkeypatch.setattr(kdops.dispatch, "HAVE_TRITON", True)
    monkeypatch.setattr(kdops.dispatch, "TRITON_INTERPRETS", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in kdops.explain("pairwise_distance", x, x)["triton"]
    assert kdops.info()["triton"].startswith("not available: no CUDA device")
    monkeypatch.setattr(kdops.dispatch, "HAVE_TRITON", False)
    assert "triton is not installed" in kdops.explain("pairwise_distance", x, x)["triton"]
    assert kdops.info()["triton"] == "not available: triton is not installed"


def test_an_extension_that_is_missing_or_broken_is_a_reason_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdops.dispatch, "_HERE", tmp_path)
    (tmp_path / "_build.json").write_text('{"cpu": {"reason": "no compiler')  # cut short
    assert kdops.info()["build"] == {}
    assert "it was not built" in str(kdops.dispatch._load_extension("_C", "cpu"))
    (tmp_path / "_build.json").write_text('{"cpu": {"reason": "no compiler"}}')
    assert kdops.dispatch._load_extension("_C", "cpu") == "the cpu extension is missing: no compiler"
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    assert "_C.abi3.so does not load" in str(kdops.dispatch._load_extension("_C", "cpu"))


def test_info_names_every_backend() -> None:
    told = kdops.info()
    for backend in BACKENDS:
        assert told[backend].startswith(("available", "not available: "))


def test_import_is_light() -> None:
    """Nothing heavy comes with the package: triton, the trainer's libraries and torchvision are for those who call them."""
    code = "import sys, kdops; print([m for m in ('triton', 'torchvision', 'lightning_fabric', 'pydantic', 'rich') if m in sys.modules])"
    plain = python("import sys, torch; print([m for m in ('triton', 'torchvision') if m in sys.modules])")
    assert python(code).stdout == plain.stdout == "[]\n"


def test_an_empty_default_is_none() -> None:
    assert python("import kdops; print(kdops.info()['default_backend'])", KDOPS_BACKEND="").stdout.strip() == "auto"


def test_a_backend_that_an_op_lacks_is_said() -> None:
    x = torch.zeros(2, 3)
    with kdops.backend("cuda"):
        with pytest.raises(RuntimeError, match="has no backend 'cuda'"):
            kdops.gaussian_distance(x, x)
        assert "reference" in kdops.explain("gaussian_distance", x, x)


def test_meta_tensors_take_the_reference() -> None:
    x = torch.zeros(3, 5, device="meta")
    assert kdops.pairwise_distance(x, x).shape == (3, 3)
    with pytest.raises(RuntimeError, match="a tensor is on meta and this backend needs cpu"):
        kdops.pairwise_distance(x, x, backend="cpu")


def test_other_layouts_and_dtypes_are_refused_with_the_reason() -> None:
    x = torch.eye(3)
    for given, why in ((x.to_sparse(), r"\.to_dense\(\)"), (x.to(torch.float8_e4m3fn), "float8_e4m3fn is not among")):
        assert not any(
            verdict.startswith("yes") for verdict in kdops.explain("pairwise_distance", given, given).values()
        )
        with pytest.raises(RuntimeError, match=why):
            kdops.pairwise_distance(given, given)


def test_modules_are_found_and_show_their_options() -> None:
    assert repr(kdops.nn.PairwiseDistance(p=2)) == "PairwiseDistance(p=2, statistic='mean', backend='auto')"


# --- transforms --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap], ids=lambda t: t.__name__)
def test_transforms_want_the_reference(transform: Callable[..., Any]) -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def of(backend: str) -> Tensor:
        if transform is torch.vmap:
            result: Tensor = torch.vmap(lambda a, b: kdops.pairwise_distance(a, b, backend=backend))(x, y)
            return result
        result = transform(lambda a: kdops.pairwise_distance(a, y[0], backend=backend).sum())(x[0])
        return result

    with pytest.raises(NotImplementedError, match=r"no rules for torch\.func"):
        of("cpu")
    assert of("reference").isfinite().all()


def test_transforms_of_any_argument_are_seen() -> None:
    """Of the second alone: the first is a plain tensor."""
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match=r"no rules for torch\.func"):
        torch.func.grad(lambda b: kdops.pairwise_distance(x, b, backend="cpu").sum())(y)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        kdops.pairwise_distance(x, torch.autograd.forward_ad.make_dual(y, y), backend="cpu")


def test_forward_mode_is_refused_in_compiled_code_too() -> None:
    """A compiled graph would drop the tangent without a word."""
    x = torch.randn(1, 4, 3)
    compiled = torch.compile(lambda a: kdops.affinity_distance(a, a), fullgraph=True, backend="aot_eager")
    before = compiled(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="NotImplementedError"),
    ):
        compiled(torch.autograd.forward_ad.make_dual(x, x))
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("module", [kdops.nn.MSCN(), kdops.nn.BrisqueFeatures()], ids=lambda m: type(m).__name__)
def test_sizes_of_images_stay_free_in_exported_programs(module: torch.nn.Module) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (torch.rand(2, 1, 48, 40),), dynamic_shapes=(dynamic,))
    image = torch.rand(3, 1, 64, 56)
    torch.testing.assert_close(program.module()(image), module(image))


@pytest.mark.parametrize(
    "module", [kdops.nn.AffinityDistance(p=1), kdops.nn.ChannelAttention()], ids=lambda m: type(m).__name__
)
def test_sizes_of_maps_stay_free_in_exported_programs(module: torch.nn.Module) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    count = 3 if isinstance(module, kdops.nn.ChannelAttention) else 2
    program = torch.export.export(
        module, tuple(torch.randn(2, 4, 7, 9) for _ in range(count)), dynamic_shapes=(dynamic,) * count
    )
    given = [torch.randn(3, 4, 6, 5) for _ in range(count)]
    torch.testing.assert_close(program.module()(*given), module(*given))
