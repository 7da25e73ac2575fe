"""Comparisons of finished runs: honest words about the gaps, refusals, listed differences, seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml

from trainers.compare import compare
from trainers.errors import InputError
from trainers.paired import t_quantile
from trainers.results import load_run


def result(runs: list[Path], out: Path) -> dict:
    compare(runs, out)
    return json.loads((out / "comparison.json").read_text())


def test_report_and_result_hold_the_same_numbers(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("facd"), fake_run("scratch", psnr=31.15, seconds=40.0)]
    report = compare(runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    text = report.read_text()
    assert report == tmp_path / "out" / "report.html"
    assert list(found["arms"]) == ["scratch", "facd"]  # the baseline comes first
    for who, psnr in {"bicubic": 29.87, "scratch": 31.15, "facd": 31.24, "teacher": 31.71}.items():
        assert found["sets"]["photos"][who]["psnr"] == psnr
        assert f"{psnr:.2f}</td>" in text
    assert found["headline"] in text
    assert found["protocol"] == "sr-y"
    assert not [word for word in ("http:", "https:", "@import", "url(") if word in text]


def test_headline_says_who_ends_ahead_and_by_how_much(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", psnr=31.15), fake_run("facd")
    expected = (
        "With one seed, facd ends 0.09 dB above scratch on photos: 31.24 against 31.15 dB, 1.37 dB above bicubic."
    )
    assert result([scratch, facd], tmp_path / "out")["headline"] == expected


def test_headline_is_honest_when_distillation_loses_or_draws(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", psnr=31.30), fake_run("facd")
    assert result([scratch, facd], tmp_path / "a")["headline"].startswith(
        "With one seed, scratch ends 0.06 dB above facd"
    )
    draw = fake_run("scratch", psnr=31.243, folder="draw")
    assert result([draw, facd], tmp_path / "b")["headline"].startswith(
        "With one seed, scratch and facd end level on photos: 31.24 dB"
    )


def test_headline_of_three(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("scratch", psnr=31.15), fake_run("output", psnr=31.238), fake_run("facd")]
    found = result(runs, tmp_path / "out")
    gaps = "level with output, 0.09 dB above scratch, 1.37 dB above bicubic"
    assert found["headline"] == f"With one seed, facd ends highest on photos with 31.24 dB: {gaps}."
    assert found["missing_baselines"] == []


def test_remarks_on_seeds_equal_time_and_missing_baselines(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("output", psnr=31.20, seconds=40.0), fake_run("facd")]
    found = result(runs, tmp_path / "out")
    remarks = " ".join(found["remarks"])
    assert found["missing_baselines"] == ["scratch"]
    assert "No scratch run is among these: what distillation gained over plain training cannot be read here." in remarks
    assert "a claim needs three paired seeds at least" in remarks
    # At 40 of its 60 s facd stood at its validation of step 2,000.
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    stood = next(line["psnr"] for line in lines if line["kind"] == "val" and line["step"] == 2000)
    assert f"At equal training time (40 s, when output was done): output 31.20 dB, facd {stood:.2f} dB" in remarks
    assert "facd is ahead of output on 2 of 2 images" in remarks


def test_differences_are_listed(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", seed=0), fake_run("facd", seed=1)
    for run, seed in ((scratch, 0), (facd, 1)):
        settings = {
            "name": run.name,
            "method": {"name": run.name},
            "train": {"seed": seed, "steps": 3000, "keep": seed},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (facd / "env.json").write_text(json.dumps({"python": "3.12.0", "packages": {"torch": "2.13.0"}}))
    found = result([scratch, facd], tmp_path / "out")
    assert found["differences"] == ["seeds: scratch 0; facd 1", "python: scratch 3.11.7; facd 3.12.0"]
    assert "These runs differ in more than their method" in (tmp_path / "out" / "report.html").read_text()


def test_alike_runs_have_no_warning(fake_run, tmp_path: Path) -> None:
    found = result([fake_run("scratch"), fake_run("facd")], tmp_path / "out")
    assert found["differences"] == []
    assert "differ in more" not in (tmp_path / "out" / "report.html").read_text()


def test_runs_that_took_about_as_long_have_no_words_on_equal_time(fake_run, tmp_path: Path) -> None:
    for other, told in ((60.5, False), (63.0, True)):
        runs = [fake_run(name, seconds=s, folder=f"{name}-{other}") for name, s in (("scratch", 60.0), ("facd", other))]
        remarks = result(runs, tmp_path / f"out-{other}")["remarks"]
        assert any(text.startswith("At equal training time") for text in remarks) == told
        assert remarks[0].startswith(
            "Mean PSNR over 2 images by protocol sr-y; bicubic 29.87 dB, teacher 31.71 dB. Each run: "
        )


def test_another_teacher_is_listed(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("scratch", teacher=False), fake_run("output"), fake_run("facd")]
    changed = json.loads((runs[2] / "result.json").read_text())
    changed["teacher"]["weights"] = "other.pth"
    (runs[2] / "result.json").write_text(json.dumps(changed))
    (listed,) = result(runs, tmp_path / "out")["differences"]
    assert listed.startswith("teacher: output edsr")
    assert listed.endswith("other.pth")


@pytest.mark.parametrize("changed", [{"protocol": "other"}, {"scale": 3}, {"task": "derain"}], ids=str)
def test_runs_that_were_not_measured_alike_are_refused(fake_run, tmp_path: Path, changed: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changed))}: .* only runs with the same can be compared"):
        compare([fake_run("scratch"), fake_run("facd", **changed)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_images_under_the_same_name_are_refused(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch"), fake_run("facd")
    changed = json.loads((facd / "result.json").read_text())
    changed["sets"]["photos"]["bicubic"]["per_image"]["mug"]["psnr"] += 0.5
    (facd / "result.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="other images"):
        compare([scratch, facd], tmp_path / "out")
    changed["sets"] = {"set5": changed["sets"]["photos"]}
    (facd / "result.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"validation sets: photos in .* but set5"):
        compare([scratch, facd], tmp_path / "out")


def test_one_run_or_an_unfinished_one_is_refused(fake_run, tmp_path: Path) -> None:
    run = fake_run("facd")
    with pytest.raises(InputError, match="needs two different runs"):
        compare([run], tmp_path / "out")
    (run / "result.json").unlink()
    with pytest.raises(InputError, match="finish it with: kdtrain resume"):
        compare([fake_run("scratch"), run], tmp_path / "out")


# --- seeds -------------------------------------------------------------------------------------------------------------

GAINS = (0.02, 0.05, 0.11)  # of facd over scratch, by seed


@pytest.fixture
def seeded(fake_run) -> list[Path]:
    """Three seeds of scratch, output and facd, whose seeds vary by more than the methods do."""
    level = {0: 31.0, 1: 31.4, 2: 30.8}
    gains = {"scratch": (0.0, 0.0, 0.0), "output": (0.03, -0.01, 0.02), "facd": GAINS}
    return [
        fake_run(method, folder=f"{method}-seed{seed}", seed=seed, psnr=psnr + gains[method][seed], seconds=seconds)
        for method, seconds in (("facd", 60.0), ("scratch", 40.0), ("output", 50.0))
        for seed, psnr in level.items()
    ]


def test_runs_that_differ_in_their_seed_are_one_arm(seeded: list[Path], tmp_path: Path) -> None:
    found = result(seeded, tmp_path / "out")
    assert list(found["arms"]) == ["scratch", "output", "facd"]
    assert all(arm["seeds"] == [0, 1, 2] for arm in found["arms"].values())
    scratch = found["sets"]["photos"]["scratch"]
    assert scratch["psnr"] == pytest.approx((31.0 + 31.4 + 30.8) / 3)
    assert scratch["deviation"] == pytest.approx(statistics.stdev([31.0, 31.4, 30.8]))
    assert scratch["per_image"]["mug"]["psnr"] == pytest.approx(scratch["psnr"] - 1.5)
    assert found["differences"] == []
    assert found["headline"].startswith("Over 3 seeds, facd ends highest on photos with 31.13 dB")


def test_differences_are_paired_by_seed(seeded: list[Path], tmp_path: Path) -> None:
    pairs = result(seeded, tmp_path / "out")["paired"]["photos"]
    assert set(pairs) == {"output", "facd"}
    assert set(pairs["output"]) == {"scratch"}
    against = pairs["facd"]["scratch"]
    assert list(against["differences"].values()) == pytest.approx(GAINS)
    half = 4.302653 * statistics.stdev(GAINS) / math.sqrt(3)
    assert against["interval"] == pytest.approx([0.06 - half, 0.06 + half], abs=1e-6)
    assert (against["n"], against["agree"], against["settled"]) == (3, 3, False)
    assert (pairs["output"]["scratch"]["agree"], pairs["facd"]["output"]["n"]) == (2, 3)


def test_infinite_psnr_is_compared(fake_run, tmp_path: Path) -> None:
    """null in the files is the PSNR of equal images."""
    runs = []
    for method, found in (("scratch", [None, 31.0]), ("output", [None, None])):
        for seed, psnr in enumerate(found):
            run = fake_run(method, seed=seed, folder=f"{method}-{seed}")
            result = json.loads((run / "result.json").read_text())
            result["sets"]["photos"]["student"]["psnr"] = psnr
            (run / "result.json").write_text(json.dumps(result))
            runs.append(run)
    report = compare(runs, tmp_path / "out").read_text()
    assert "<td>inf</td>" in report.replace(' class="best"', "")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert found["paired"]["photos"]["output"]["scratch"]["differences"] == {"0": 0.0, "1": None}
    assert not found["paired"]["photos"]["output"]["scratch"]["settled"]


def test_words_about_seeds_say_what_is_settled(seeded: list[Path], fake_run, tmp_path: Path) -> None:
    remarks = result(seeded, tmp_path / "out")["remarks"]
    (against,) = [text for text in remarks if text.startswith("Against scratch")]
    assert "not settled by these seeds: output" in against
    assert "facd (−0.054 to +0.174 dB, n = 3)" in against
    assert any("not corrected for how many pairs" in text for text in remarks)
    sure = [fake_run("facd", folder=f"sure-seed{seed}", seed=seed, psnr=31.3 + seed / 1000) for seed in (0, 1)]
    plain = [fake_run("scratch", folder=f"plain-seed{seed}", seed=seed, psnr=31.1) for seed in (0, 1)]
    remarks = result([*sure, *plain], tmp_path / "sure")["remarks"]
    assert any(
        text.startswith("Against scratch, on photos, above it: facd (+0.194 to +0.207 dB, n = 2)") for text in remarks
    )


def test_one_seed_is_no_claim(fake_run, tmp_path: Path) -> None:
    found = result([fake_run("scratch", psnr=30.0), fake_run("facd")], tmp_path / "out")
    against = found["paired"]["photos"]["facd"]["scratch"]
    assert (against["n"], against["deviation"], against["interval"], against["settled"]) == (1, None, None, False)
    assert not any("Against scratch" in text for text in found["remarks"])


def test_without_a_baseline_nothing_is_paired(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("facd", folder=name) for name in ("weak", "strong")]
    for run, weight in zip(runs, (0.1, 1.0), strict=True):
        settings = {"name": run.name, "method": {"name": "facd", "weights": {"contrast": weight}}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = result(runs, tmp_path / "out")
    assert found["paired"] == {"photos": {}}
    assert found["missing_baselines"] == ["scratch", "output"]
    assert "Paired differences" not in (tmp_path / "out" / "report.html").read_text()


def test_seeds_that_only_one_arm_has_are_not_paired(seeded: list[Path], tmp_path: Path) -> None:
    found = result(seeded[:-1], tmp_path / "out")  # output lacks seed 2
    assert found["differences"] == ["seeds: scratch 0, 1, 2; output 0, 1; facd 0, 1, 2"]
    assert list(found["paired"]["photos"]["output"]["scratch"]["differences"]) == ["0", "1"]


def test_equal_seconds_are_those_of_the_quickest_run(seeded: list[Path], tmp_path: Path) -> None:
    found = result(seeded, tmp_path / "out")
    assert found["equal_seconds"] == 40.0
    scratch, facd = (found["sets"]["photos"][arm] for arm in ("scratch", "facd"))
    assert scratch["at_equal_seconds"] == scratch["by_seed"]
    run = load_run(seeded[0])  # facd, seed 0, stood at step 2,000 of 3,000
    assert facd["at_equal_seconds"]["0"] == pytest.approx(dict(run.validation("photos", "step"))[2000])
    gain = found["paired_at_equal_seconds"]["photos"]["facd"]["scratch"]
    assert gain["mean"] < found["paired"]["photos"]["facd"]["scratch"]["mean"]


def test_a_run_without_a_validation_by_then_has_no_value(fake_run, tmp_path: Path) -> None:
    found = result([fake_run("scratch", seconds=40.0), fake_run("facd", seconds=600.0)], tmp_path / "out")
    assert any("scratch 31.24 dB, facd not yet validated" in text for text in found["remarks"])
    assert found["paired_at_equal_seconds"] == {"photos": {}}
    assert rows_of(tmp_path / "out")["facd"]["PSNR after 40 s"] == "not yet validated"


def test_report_shows_spread_band_and_pairs(seeded: list[Path], tmp_path: Path) -> None:
    text = compare(seeded, tmp_path / "out").read_text()
    assert "31.127 ± 0.285" in text
    assert text.count("<polygon") == 6  # three arms, per step and per second
    assert "shaded from the lowest to the highest seed" in text
    assert "−0.054 to +0.174" in text
    assert "Students are those of seed 0." in text


def test_markdown_is_a_table_to_paste(seeded: list[Path], tmp_path: Path) -> None:
    compare(seeded, tmp_path / "out", {"slkd": "same-size tasks only"})
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    facd = next(line for line in table if line.startswith("| facd |"))
    assert "| 0, 1, 2 | 31.127 ± 0.285 | 0.9123 | +0.060, −0.054 to +0.174, 3 of 3 |" in facd
    assert table[-1].startswith("| slkd |")
    assert "not applicable: same-size tasks only" in table[-1]


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    """The table of comparison.md: first cell -> head -> cell."""
    lines = (folder / "comparison.md").read_text().splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def test_markdown_says_where_runs_stood_at_equal_seconds(seeded: list[Path], tmp_path: Path) -> None:
    stood = result(seeded, tmp_path / "out")["sets"]["photos"]["facd"]["at_equal_seconds"].values()
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["bicubic", "teacher", "scratch", "output", "facd"]
    assert rows["facd"]["PSNR after 40 s"] == f"{statistics.mean(stood):.2f}"
    assert (rows["teacher"]["PSNR (dB)"], rows["teacher"]["SSIM"]) == ("31.71", "0.9201")


def test_markdown_of_single_seeds_without_a_teacher(fake_run, tmp_path: Path) -> None:
    compare([fake_run("scratch", psnr=31.15, teacher=False), fake_run("facd", teacher=False)], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["bicubic", "scratch", "facd"]
    (against,) = (cell for head, cell in rows["facd"].items() if head.startswith("against scratch"))
    assert against == "+0.090, n = 1"


def test_runs_of_one_method_with_other_settings_are_told_apart_by_name(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("facd", folder=f"{name}-seed{seed}", seed=seed) for name in ("weak", "strong") for seed in (0, 1)]
    for run in runs:
        weight = 0.1 if run.name.startswith("weak") else 1.0
        settings = {"name": run.name, "method": {"name": "facd", "weights": {"contrast": weight}}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert list(result([*runs, fake_run("scratch")], tmp_path / "out")["arms"]) == ["scratch", "weak", "strong"]


def test_runs_without_names_of_seeds_are_called_by_their_first_then_by_their_folder(fake_run, tmp_path: Path) -> None:
    for names, labels in (({}, ["a0", "b0"]), ({"name": "same"}, None)):
        where = tmp_path / f"named-{bool(names)}"
        runs = [fake_run("facd", folder=f"{where.name}/{a}{seed}", seed=seed, **names) for a in "ab" for seed in (0, 1)]
        for run in runs:
            if not names:
                found = json.loads((run / "result.json").read_text())
                (run / "result.json").write_text(json.dumps(found | {"name": run.name}))
            method = {"name": "facd", "weights": {"contrast": 0.1 if run.name.startswith("a") else 1.0}}
            (run / "config.yaml").write_text(yaml.safe_dump({"method": method}))
        arms = list(result(runs, tmp_path / f"out-{bool(names)}")["arms"])
        assert arms == (labels or [str(where / "a0"), str(where / "b0")])


def test_scratch_is_the_judge_and_not_its_sliced_start(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("scratch", folder=f"{name}-seed0") for name in ("sliced", "scratch")]
    settings = {"name": "sliced-seed0", "method": {"name": "scratch"}, "student": {"weights": "teacher"}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(settings))
    found = result([*runs, fake_run("facd")], tmp_path / "out")
    assert set(found["arms"]) == {"scratch", "sliced", "facd"}
    assert set(found["paired"]["photos"]["facd"]) == {"scratch"}


def test_a_seed_that_was_run_twice_is_no_spread(fake_run, tmp_path: Path) -> None:
    found = result([fake_run("facd", folder="one"), fake_run("facd", folder="two")], tmp_path / "out")
    assert list(found["arms"]) == ["one", "two"]
    only_seeds = [fake_run("facd", folder=f"seed{seed}", seed=seed) for seed in (0, 1)]
    with pytest.raises(InputError, match="differ in their seed alone"):
        compare(only_seeds, tmp_path / "none")


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)
