"""Comparisons: honest words about the gaps, refusals, listed differences, and runs that are reused, resumed or trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from trainers import launch
from trainers.compare import compare, run_and_compare
from trainers.config import Config
from trainers.config_file import dump_config
from trainers.data.images import write_png
from trainers.errors import InputError


def result(runs: list[Path], out: Path) -> dict:
    compare(runs, out)
    return json.loads((out / "result.json").read_text())


def test_report_and_result_hold_the_same_numbers(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("facd"), fake_run("scratch", psnr=31.15, seconds=40.0)]
    report = compare(runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    text = report.read_text()
    assert report == tmp_path / "out" / "report.html"
    assert list(found["runs"]) == ["scratch", "facd"]  # the baseline comes first
    for who, psnr in {"bicubic": 29.87, "scratch": 31.15, "facd": 31.24, "teacher": 31.71}.items():
        assert found["sets"]["photos"][who]["psnr"] == psnr
        assert f"{psnr:.2f}</td>" in text
    assert found["headline"] in text
    assert found["protocol"] == "sr-y"
    assert not [word for word in ("http:", "https:", "@import", "url(") if word in text]


def test_headline_says_who_ends_ahead_and_by_how_much(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", psnr=31.15), fake_run("facd")
    expected = "facd ends 0.09 dB above scratch on photos: 31.24 against 31.15 dB, 1.37 dB above bicubic."
    assert result([scratch, facd], tmp_path / "out")["headline"] == expected


def test_headline_is_honest_when_distillation_loses_or_draws(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", psnr=31.30), fake_run("facd")
    assert result([scratch, facd], tmp_path / "a")["headline"].startswith("scratch ends 0.06 dB above facd")
    draw = fake_run("scratch", psnr=31.243, folder="draw")
    assert result([draw, facd], tmp_path / "b")["headline"].startswith("scratch and facd end level on photos: 31.24 dB")


def test_headline_of_three(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("scratch", psnr=31.15), fake_run("output", psnr=31.238), fake_run("facd")]
    found = result(runs, tmp_path / "out")
    gaps = "level with output, 0.09 dB above scratch, 1.37 dB above bicubic"
    assert found["headline"] == f"facd ends highest on photos with 31.24 dB: {gaps}."
    assert found["missing_baselines"] == []


def test_remarks_on_seeds_equal_time_and_missing_baselines(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("output", psnr=31.20, seconds=40.0), fake_run("facd")]
    found = result(runs, tmp_path / "out")
    remarks = " ".join(found["remarks"])
    assert found["missing_baselines"] == ["scratch"]
    assert "No scratch run is among these: what distillation gained over plain training cannot be read here." in remarks
    assert "One seed per method" in remarks
    # At 40 of its 60 s facd stood at its validation of step 2,000.
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    stood = next(line["psnr"] for line in lines if line["kind"] == "val" and line["step"] == 2000)
    assert f"At equal training time (40 s, when output was done): output 31.20 dB, facd {stood:.2f} dB" in remarks
    assert "facd is ahead of output on 2 of 2 images" in remarks


def test_differences_are_listed(fake_run, tmp_path: Path) -> None:
    scratch, facd = fake_run("scratch", seed=0), fake_run("facd")
    for run, seed in ((scratch, 0), (facd, 1)):
        settings = {
            "name": run.name,
            "method": {"name": run.name},
            "train": {"seed": seed, "steps": 3000, "keep": seed},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (facd / "env.json").write_text(json.dumps({"python": "3.12.0", "packages": {"torch": "2.13.0"}}))
    found = result([scratch, facd], tmp_path / "out")
    assert found["differences"] == ["train.seed: scratch 0, facd 1", "python: scratch 3.11.7, facd 3.12.0"]
    assert "These runs differ in more than their method" in (tmp_path / "out" / "report.html").read_text()


def test_alike_runs_have_no_warning(fake_run, tmp_path: Path) -> None:
    found = result([fake_run("scratch"), fake_run("facd")], tmp_path / "out")
    assert found["differences"] == []
    assert "differ in more" not in (tmp_path / "out" / "report.html").read_text()


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


def test_runs_of_one_method_are_told_apart_by_name(fake_run, tmp_path: Path) -> None:
    runs = [fake_run("facd", folder=f"facd-seed{seed}", seed=seed, psnr=31.2 + seed / 100) for seed in (0, 1)]
    found = result([*runs, fake_run("scratch")], tmp_path / "out")
    assert list(found["runs"]) == ["scratch", "facd-seed0", "facd-seed1"]
    assert any("show the spread over seeds" in remark for remark in found["remarks"])


# --- run_and_compare ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A training that takes a second: two steps on one small image."""
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    for folder in ("train", "val"):
        write_png(tmp_path / folder / "noise.png", noise)
    tiny = {"arch": "edsr", "features": 4, "blocks": 3}
    config = {
        "name": "tiny",
        "data": {"train": {"gt": "train"}, "val": [{"name": "noise", "gt": "val"}], "patch": 16, "batch": 2},
        "student": tiny,
        "method": {"name": "scratch"},
        "train": {"steps": 2, "devices": 1, "accelerator": "cpu"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "tiny.yaml"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, fake_run) -> list[str]:
    """Stands in for training: what was started, in order. A run called "interrupted" stops before it is done."""
    started: list[str] = []

    def finish(config: Config) -> None:
        folder = Path(config.out) / config.name
        done = fake_run(config.method.name, folder=f"fake-{len(started)}-{config.name}")
        folder.mkdir(parents=True, exist_ok=True)
        for file in done.iterdir():
            if file.name != "config.yaml":
                file.rename(folder / file.name)

    def train(config: Config, console: object = None) -> None:
        started.append(f"train {config.name}")
        folder = Path(config.out) / config.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(config))
        if len(started) != 2:  # the second training is interrupted
            finish(config)
        else:
            raise KeyboardInterrupt

    def resume(folder: Path, overrides: object = (), console: object = None) -> None:
        started.append(f"resume {folder.name}")
        finish(launch.load_config(folder / "config.yaml"))

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(launch, "resume", resume)
    return started


def teacher_weights(config_file: Path) -> list[str]:
    """Overrides that give the tiny config a teacher."""
    from safetensors.torch import save_file

    from trainers.models import MODELS

    entry = MODELS["edsr"]
    weights = config_file.parent / "teacher.safetensors"
    save_file(entry.build(entry.options(features=4, blocks=3)).state_dict(), weights)
    return [f"teacher={{arch: edsr, features: 4, blocks: 3, weights: {weights}}}"]


def test_absent_runs_are_trained_unfinished_resumed_finished_kept(launched, config_file: Path, tmp_path: Path) -> None:
    overrides = teacher_weights(config_file)
    with pytest.raises(KeyboardInterrupt):
        run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", overrides)
    assert launched == ["train scratch", "train output"]
    report = run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", overrides)
    assert launched[2:] == ["resume output"]
    assert report.is_file()
    run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", overrides)
    assert len(launched) == 3


def test_folder_of_another_config_is_refused(launched, config_file: Path, tmp_path: Path) -> None:
    overrides = teacher_weights(config_file)
    with pytest.raises(KeyboardInterrupt):
        run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", overrides)
    with pytest.raises(InputError, match=r"another config \(train\.lr: 0\.0002 -> 0\.001\)"):
        run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", [*overrides, "train.lr=1e-3"])
    run_and_compare(config_file, ["scratch", "output"], tmp_path / "out", [*overrides, "train.accumulate=2"])


def test_a_problem_of_any_method_is_found_before_the_first_training(
    launched, config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="teacher"):
        run_and_compare(config_file, ["scratch", "output"], tmp_path / "out")  # no teacher is given
    with pytest.raises(InputError, match="facd: a comparison needs two different runs or methods"):
        run_and_compare(config_file, ["facd"], tmp_path / "out")
    assert launched == []


def test_real_trainings_end_in_a_comparison(config_file: Path, tmp_path: Path) -> None:
    report = run_and_compare(config_file, ["scratch", "facd"], tmp_path / "out", teacher_weights(config_file))
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(found["runs"]) == ["scratch", "facd"]
    assert set(found["sets"]["noise"]) == {"bicubic", "scratch", "facd", "teacher"}
    assert found["differences"] == []
    text = report.read_text()
    for who in ("bicubic", "scratch", "facd", "teacher"):
        assert f"{found['sets']['noise'][who]['psnr']:.2f}" in text
    for run in ("scratch", "facd"):
        assert (tmp_path / "out" / run / "report.html").is_file()
