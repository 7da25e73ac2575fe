"""What keeps the benchmarks honest: rows are replaced and never lost, floors are the slower bound, a red op is not reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, check, contract_gate, measure, report, results
from benchmarks.machine import Peaks
from benchmarks.suite import CHOSEN, Case, Provider, Suite, eager_and_compiled, geometric_mean, library
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


def test_an_op_whose_contract_is_red_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contract_gate, "STAMPS", tmp_path)
    monkeypatch.setattr(contract_gate, "TESTS", [str(tmp_path / "test_red.py")])
    (tmp_path / "test_red.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('case', ['some_op-cpu-x'])\ndef test_01(case):\n    assert False\n"
    )
    contract_gate._red.cache_clear()
    assert str(contract_gate._red("some_op", "cpu")) == "its contract is red: test_01[some_op-cpu-x]; 1 failed"
    assert "assert False" in capsys.readouterr().err  # what failed is seen where only the output comes back
    assert "did not run" in str(contract_gate._red("another_op", "cpu"))
    assert contract_gate.refusal("some_op", "eager", True) is None
    assert contract_gate.refusal("some_op", "kdops.cpu", False) is None


def test_a_contract_that_takes_too_long_is_red_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract_gate, "STAMPS", tmp_path)
    monkeypatch.setattr(contract_gate, "TESTS", [str(tmp_path / "test_green.py")])
    (tmp_path / "test_green.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('case', ['some_op-cpu-x'])\ndef test_01(case):\n    assert True\n"
    )
    stamp = contract_gate._stamp(("some_op", "cpu"))
    contract_gate._run([("some_op", "cpu")], 0.01)
    assert stamp.read_text() == "its contract was not done in time"
    contract_gate._run([("some_op", "cpu")], None)
    assert stamp.read_text() == ""


def test_when_the_time_is_up_an_op_whose_tests_are_all_done_is_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract_gate, "STAMPS", tmp_path)
    monkeypatch.setattr(contract_gate, "TESTS", [str(tmp_path / "test_slow.py")])
    (tmp_path / "test_slow.py").write_text(
        "import pytest, time\n\n@pytest.mark.parametrize('case', ['fast_op-cpu-x', 'slow_op-cpu-x'])\n"
        "def test_01(case):\n    time.sleep(60 * case.startswith('slow'))\n"
    )
    pairs = [("fast_op", "cpu"), ("slow_op", "cpu")]
    contract_gate._run(pairs, 20)
    assert [contract_gate._stamp(pair).read_text() for pair in pairs] == ["", "its contract was not done in time"]


def failing(*args: torch.Tensor, p: int = 1) -> torch.Tensor:
    raise torch.OutOfMemoryError("Tried to allocate 8 TiB\nand more words")


def test_a_provider_that_fails_is_a_row_and_the_others_are_measured() -> None:
    case = Case("tiny", ((2, 3), (4, 3)), (1,), options=(("p", 1),), rounds=2)
    suite = Suite(
        "pairwise_distance", [case], {"eager": Provider(reference.pairwise_distance), "large": Provider(failing)}
    )
    assert set(suite.timings(case)) == {"kdops.cpu", "eager"}
    with pytest.raises(pytest.skip.Exception, match="it failed: Tried to allocate 8 TiB"):
        suite.row(None, case, "large", True)
    (stored,) = results.read(next(results.machines()))
    assert stored["refused"] == "it failed: Tried to allocate 8 TiB"
    suite.providers["kdops.cpu"] = suite.providers["large"]
    suite.failures[case, "kdops.cpu"] = "it failed: no kernel"
    suite.timings = lambda case: {}  # type: ignore[method-assign]
    with pytest.raises(pytest.fail.Exception, match="no kernel"):  # ours may not fail in silence
        suite.row(None, case, "kdops.cpu", False)


@pytest.mark.parametrize(
    ("launching", "waits"),
    [(1e-3, [1e-3, 2e-3]), (0, [0, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]), (9, [measure.LONGEST_LAUNCH])],
)
def test_a_gpu_that_began_before_all_was_queued_is_kept_busy_for_longer(
    launching: float, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here queueing takes 1.5 ms, and a clock counts the seconds that the device is kept busy."""
    busy: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return busy[-1] < 1.5e-3

        def elapsed_time(self, end: Event) -> float:
            return 7.0 * len(busy)

    monkeypatch.setattr(measure, "_larger_than_cache", lambda: torch.empty(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: busy.append(cycles / measure.CYCLES))
    assert measure.on_device(lambda: None, launching) == pytest.approx(7e-3 * len(waits))  # the last attempt counts
    assert busy == pytest.approx(waits)


def test_a_library_that_is_not_installed_says_so() -> None:
    absent = library("no_such_library", lambda: Provider(torch.cdist))
    assert absent.refusal(Case("any", (), ())) == "no_such_library is not installed"
    assert absent.device == "cuda"
    assert library("torch", lambda: Provider(torch.cdist)).refusal(Case("any", (), ())) is None


def test_the_command_line_chooses_device_and_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOSEN, "without", ("max-autotune", "compile"))
    case = Case("tiny", ((2, 3), (4, 3)), (1,))
    suite = Suite("pairwise_distance", [case], eager_and_compiled(reference.pairwise_distance))
    assert [provider for _, provider in suite.rows()] == ["kdops.cpu", "eager"]
    monkeypatch.setattr(CHOSEN, "device", "cuda")
    assert Suite("pairwise_distance", [case], eager_and_compiled(reference.pairwise_distance)).rows() == []


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
        "| growing N, 1x48x32x32, float32, forward | **kdops.cpu** | 1.0 | 0.1 |  | 3.00 | 50 % | 8 | 4 | 1e-7 |"
        in page
    )
    assert "not measured: too large" in page
    drawing = (tmp_path / "pictures" / "here-affinity_distance-time.svg").read_text()
    assert drawing.count("<polyline") == 3  # two providers and the floor
    assert 'data-x="256 1024"' in drawing


def test_training_steps_stand_together_and_a_folder_has_a_page_of_its_own(tmp_path: Path) -> None:
    step = {"shape": "2x3x64x64", "dtype": "float32", "mode": "training step", "spread_ms": "1", "peak_mib": "35.3"}
    rows = [
        row(op=f"step:{method}", case=f"{method}, EDSR", provider=provider, median_ms=median, **step)
        for method in ("skd", "facd")
        for provider, median in (("kdops.auto", "10.0"), ("reference", "20.0"))
    ]
    results.store("here", rows)
    report.main(tmp_path / "results")
    page = (tmp_path / "results" / "benchmarks.md").read_text()
    assert page.count("### ") == 1
    assert "### Training steps, on here" in page
    assert "2.00 times faster in geometric mean over 2 cases" in page
    assert (
        "| skd, EDSR, 2x3x64x64, float32, training step | **kdops.auto** | 10.0 | 1 |  | 2.00 |  | 35.3 |  |  |" in page
    )


def test_a_training_step_is_measured_on_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"arch": "edsr", "features": 4, "blocks": 3}
    monkeypatch.setitem(bench_step.NETWORKS, "tiny", {"task": "sr", "teacher": small, "student": small})
    case = bench_step.Case("facd", "tiny", 16, 2, rounds=2)
    found = bench_step.measured(case)
    assert list(found) == ["kdops.auto", "reference"]
    assert all(timing.median > 0 for timing, _ in found.values())
    assert bench_step.ops_of(case) == {"contrastive_ratio", "matched_distance", "pairwise_distance"}
    bench_step.keep("step:facd", case, "kdops.auto", {"median_ms": 1.0}, True)
    (stored,) = results.read(next(results.machines()))
    assert (stored["op"], stored["mode"], stored["shape"]) == ("step:facd", "training step", "2x3x16x16")
    methods = {case.method for case in bench_step.CASES if case.networks == "thin Restormer"}
    assert {"scratch", "skd", "facd", "dckd"} <= methods
    assert "dukd" not in methods  # it refuses tasks that keep the size


def test_the_check_goes_on_when_a_measurement_adds_a_name_to_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning does: it keeps a register in the module where it was raised."""
    from benchmarks import bench_affinity

    seen = []
    for suite in check.suites():
        monkeypatch.setattr(bench_affinity, f"added_by_{len(seen)}", None, raising=False)
        seen.append(suite)
    assert len(seen) > 5


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


@pytest.mark.parametrize("channels", [64, 128, 180, 256])
def test_tiles_that_are_shipped_are_tried_again(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import tune
    from kdops import tiles
    from kdops.codebook import table as codebook
    from kdops.spatial_attention import table as spatial_attention

    monkeypatch.setattr(tiles, "architecture", lambda: "cuda:90")
    for op, table in (("spatial_attention", spatial_attention), ("codebook", codebook)):
        for kernel in tune.KERNELS[op]:
            tried = {job.tile for job in tune.candidates(op, kernel, channels)}
            if op != "codebook" or (kernel == "student") == codebook.in_one_sweep(channels, torch.bfloat16):
                assert table.tile_for(kernel, channels, torch.bfloat16) in tried, kernel
            else:
                assert not tried
