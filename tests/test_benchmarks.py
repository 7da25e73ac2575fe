"""What keeps the benchmarks honest: rows are replaced and never lost, floors are the slower bound, a red op is not reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import check, contract_gate, report, results
from benchmarks.machine import Peaks
from benchmarks.suite import Case, Provider, Suite, eager_and_compiled, geometric_mean
from kdops.contrast import reference


def row(**changed: str) -> results.Row:
    return {**dict.fromkeys(results.FIELDS, ""), "op": "affinity_distance", "provider": "eager", **changed}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def test_a_rerun_replaces_its_row_and_keeps_the_others() -> None:
    results.store("here", [row(median_ms="3"), row(provider="compile", median_ms="2")])
    results.store("here", [row(median_ms="1")])
    assert [(r["provider"], r["median_ms"]) for r in results.read("here")] == [("compile", "2"), ("eager", "1")]
    assert list(results.machines()) == ["here"]


def test_a_failed_write_leaves_the_old_rows(folder: Path) -> None:
    results.store("here", [row(median_ms="3")])
    with pytest.raises(ValueError, match="not_a_field"):
        results.store("here", [row(not_a_field="1")])
    assert [r["median_ms"] for r in results.read("here")] == ["3"]


def test_a_floor_is_the_slower_of_moving_and_computing() -> None:
    peaks = Peaks(bytes=10.0, matrix=100.0, vector=50.0)
    assert peaks.floor(20, 100, "matrix") == 2.0
    assert peaks.floor(20, 400, "matrix") == 4.0
    assert peaks.floor(20, 400, "vector") == 8.0


def test_a_step_returns_results_and_the_gradients_of_trained_tensors() -> None:
    case = Case("tiny", ((2, 3), (4, 3)), (1,), (0, 1), options=(("p", 1),))
    suite = Suite("pairwise_distance", [case], eager_and_compiled(reference.pairwise_distance))
    inputs = case.inputs()
    out, grad = case.step(suite.baselines["eager"].function, inputs)()
    torch.testing.assert_close(out, torch.cdist(*inputs, p=1))
    assert grad.shape == inputs[1].shape
    assert set(suite.timings(case)) == {"kdops.cpu", "eager", "compile", "max-autotune"}


def test_providers_that_cannot_run_are_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("large", ((2, 3), (4, 3)), (1,), held=2**50)
    suite = Suite("pairwise_distance", [case], eager_and_compiled(reference.pairwise_distance))
    assert [p for _, p in suite.rows()] == ["kdops.cpu", "eager", "compile", "max-autotune"]
    assert "1048576 GiB" in str(suite.baselines["eager"].refusal(case))
    with pytest.raises(pytest.skip.Exception, match="it would hold"):
        suite.row(None, case, "eager", True)
    (stored,) = results.read(next(results.machines()))
    assert "it would hold" in stored["refused"]
    assert stored["median_ms"] == ""


def test_an_op_whose_contract_is_red_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract_gate, "STAMPS", tmp_path)
    monkeypatch.setattr(contract_gate, "TESTS", [str(tmp_path / "test_red.py")])
    (tmp_path / "test_red.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('case', ['some_op-cpu-x'])\ndef test_01(case):\n    assert False\n"
    )
    contract_gate._red.cache_clear()
    assert "red" in str(contract_gate._red("some_op", "cpu"))
    assert contract_gate.refusal("some_op", "eager", True) is None
    assert contract_gate.refusal("some_op", "kdops.cpu", False) is None


def test_geometric_mean() -> None:
    assert geometric_mean([1, 4]) == pytest.approx(2)
    assert Provider(torch.cdist).refusal(Case("any", (), ())) is None


def growing(provider: str, side: int, median: float) -> results.Row:
    figures = {"median_ms": str(median), "spread_ms": "0.1", "floor_ms": "0.5", "peak_mib": "8", "tensors_mib": "4"}
    names = {"case": "growing N", "shape": f"1x48x{side}x{side}", "dtype": "float32", "mode": "forward"}
    return row(provider=provider, error="1e-7", **figures, **names)


def test_the_page_says_what_was_measured_and_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    (tmp_path / "benchmarks.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    refused = row(
        provider="sdpa", case="growing N", shape="1x48x32x32", dtype="float32", mode="forward", refused="too large"
    )
    rows = [growing(p, side, ms) for p, ms in (("kdops.cpu", 1.0), ("eager", 3.0)) for side in (16, 32)]
    results.store("here", [*rows, refused])
    report.main()
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("before")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "3.00 times faster in geometric mean over 2 cases" in page
    assert (
        "| growing N, 1x48x32x32, float32, forward | **kdops.cpu** | 1.0 | 0.1 | 3.00 | 50 % | 8 | 4 | 1e-7 |" in page
    )
    assert "not measured: too large" in page
    drawing = (tmp_path / "pictures" / "here-affinity_distance-time.svg").read_text()
    assert drawing.count("<polyline") == 3  # two providers and the floor
    assert 'data-x="256 1024"' in drawing


def test_the_check_compares_with_the_fastest_stored_baseline() -> None:
    group = [growing("kdops.cpu", 16, 1.0), growing("compile", 16, 2.0), growing("eager", 16, 3.0)]
    assert check.stored_rivals(group) == (2.0, "compile")
    assert check.stored_rivals(group[:1]) is None
    assert check.stored_rivals([group[0], growing("eager", 16, 1e4)]) is None
    assert {suite.spec.name for suite in check.suites()} >= {
        "affinity_distance",
        "channel_attention",
        "spatial_attention",
    }
