"""Comparisons that train: runs are reused, resumed or trained, a method that cannot be is a row; and the recipes that were run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.trainers.test_compare import result
from trainers import launch, plan
from trainers.checkpoint import Checkpoints
from trainers.compare import applicable, compare, run_and_compare
from trainers.config import Config
from trainers.config_file import dump_config
from trainers.data.images import write_png
from trainers.errors import InputError
from trainers.footprint import Cost, StepCosts
from trainers.models import find
from trainers.plan import Measured


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


MEASURED = Measured(
    peak=512 * 2**20,
    seconds=0.05,
    costs=StepCosts(
        student=Cost(seconds=0.01),
        teachers={"teacher": Cost(seconds=0.004)},
        terms={"pixel": Cost(2**20, 0, 0, 0.001), "contrast": Cost(0, 2**22, 2**23, 0.02)},
        peak=2**24,
        weights=1,
        trained=1,
        seconds=0.04,
    ),
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, fake_run) -> list[str]:
    """Stands in for training and for measuring: what was started, in order. The second training is interrupted."""
    started: list[str] = []

    def finish(config: Config) -> None:
        folder = Path(config.out) / config.name
        done = fake_run(config.method.name, folder=f"fake-{len(started)}-{config.name}", seed=config.train.seed)
        folder.mkdir(parents=True, exist_ok=True)
        for file in done.iterdir():
            if file.name != "config.yaml":
                file.rename(folder / file.name)

    def train(config: Config, console: object = None) -> None:
        started.append(f"train {config.name}")
        folder = Path(config.out) / config.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(config))
        if len(started) != 2:
            finish(config)
        else:
            Checkpoints(folder / "checkpoints", keep=1).save(1, {"student": {}}, {}, best=False)
            raise KeyboardInterrupt

    def resume(folder: Path, overrides: object = (), console: object = None) -> None:
        started.append(f"resume {folder.name}")
        finish(launch.load_config(folder / "config.yaml"))

    def restart(folder: Path, console: object) -> None:
        started.append(f"restart {folder.name}")
        finish(launch.load_config(folder / "config.yaml"))

    def measure(config: Config, point: object) -> Measured:
        started.append(f"measure {config.method.name}")
        return MEASURED

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(launch, "resume", resume)
    monkeypatch.setattr(launch, "restart", restart)
    monkeypatch.setattr(plan, "measure_in_child", measure)
    return started


def teacher_weights(config_file: Path) -> list[str]:
    """Overrides that give the tiny config a teacher."""
    entry = find("edsr")
    weights = config_file.parent / "teacher.safetensors"
    save_file(entry.build(entry.options(features=4, blocks=3)).state_dict(), weights)
    return [f"teacher={{arch: edsr, features: 4, blocks: 3, weights: {weights}}}"]


def interrupted(launched: list[str], config_file: Path, out: Path, overrides: list[str]) -> None:
    """A comparison of two methods whose second training stops."""
    with pytest.raises(KeyboardInterrupt):
        run_and_compare(config_file, ["output"], out, overrides)
    assert launched == ["train scratch-seed0", "train output-seed0"]


def test_absent_runs_are_trained_unfinished_resumed_finished_kept(launched, config_file: Path, tmp_path: Path) -> None:
    overrides, out = teacher_weights(config_file), tmp_path / "out"
    interrupted(launched, config_file, out, overrides)
    assert run_and_compare(config_file, ["output"], out, overrides).is_file()
    assert launched[2:] == ["resume output-seed0", "measure scratch", "measure output"]
    run_and_compare(config_file, ["output"], out, overrides)
    assert len(launched) == 5
    run_and_compare(config_file, ["output"], out, overrides, seeds=[0, 1])
    assert launched[5:] == ["train scratch-seed1", "train output-seed1"]


def test_a_run_that_ended_before_its_first_checkpoint_is_trained_from_the_start(
    launched, config_file: Path, tmp_path: Path
) -> None:
    overrides, out = teacher_weights(config_file), tmp_path / "out"
    interrupted(launched, config_file, out, overrides)
    shutil.rmtree(out / "output-seed0" / "checkpoints")
    run_and_compare(config_file, ["output"], out, overrides)
    assert launched[2:] == ["restart output-seed0", "measure scratch", "measure output"]


def test_folder_of_another_config_is_refused(launched, config_file: Path, tmp_path: Path) -> None:
    overrides, out = teacher_weights(config_file), tmp_path / "out"
    interrupted(launched, config_file, out, overrides)
    with pytest.raises(InputError, match=r"another config \(train\.lr: 0\.0002 -> 0\.001\)"):
        run_and_compare(config_file, ["output"], out, [*overrides, "train.lr=1e-3"])
    run_and_compare(config_file, ["output"], out, [*overrides, "train.accumulate=2"])


def test_a_problem_of_any_method_is_found_before_the_first_training(
    launched, config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="teacher"):
        run_and_compare(config_file, ["fakd"], tmp_path / "out")  # no teacher is given
    with pytest.raises(InputError, match="there is no fadc"):
        run_and_compare(config_file, ["fadc"], tmp_path / "out")
    with pytest.raises(InputError, match="scratch: a comparison needs two different runs or methods"):
        run_and_compare(config_file, ["scratch"], tmp_path / "out")
    assert launched == []


def test_baselines_are_added_and_what_is_not_applicable_is_a_row(config_file: Path) -> None:
    taught = teacher_weights(config_file)
    configs, refused = applicable(config_file, ["facd"], taught, print)
    assert (list(configs), refused) == (["scratch", "output", "facd"], {})
    configs, refused = applicable(config_file, ["scratch", "sliced"], [], print)
    assert list(configs) == ["scratch"]
    assert refused["output"] == "it needs a teacher, and this config has none"
    assert "a slice of a teacher needs one" in refused["sliced"]
    configs, refused = applicable(config_file, ["dukd", "sliced"], [*taught], print)
    assert list(configs) == ["scratch", "output", "dukd", "sliced"]
    assert configs["sliced"].student.weights == "teacher"


def test_a_method_that_refuses_the_task_is_a_row_with_the_reason(config_file: Path, tmp_path: Path, launched) -> None:
    entry = find("nafnet")
    small = {"width": 4, "encoder_blocks": [1], "middle_blocks": 1, "decoder_blocks": [1]}
    save_file(entry.build(entry.options(**small)).state_dict(), tmp_path / "nafnet.safetensors")
    network = "{arch: nafnet, width: 4, encoder_blocks: [1], middle_blocks: 1, decoder_blocks: [1]"
    overrides = [
        "task=denoise",
        f"student={network}}}",
        f"teacher={network}, weights: {tmp_path / 'nafnet.safetensors'}}}",
    ]
    configs, refused = applicable(config_file, ["dukd"], overrides, print)
    assert list(configs) == ["scratch", "output"]
    assert "this task keeps the size" in refused["dukd"]
    interrupted(launched, config_file, tmp_path / "out", overrides)
    text = run_and_compare(config_file, ["dukd"], tmp_path / "out", overrides).read_text()
    assert f"not applicable: {refused['dukd']}" in text


def test_costs_of_each_loss_term_are_shown(launched, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(launched, config_file, out, teacher_weights(config_file))
    text = run_and_compare(config_file, ["output"], out, teacher_weights(config_file)).read_text()
    assert "<h2>Cost of a step</h2>" in text
    assert "20.0 ms<br><small>12.0 MiB</small>" in text  # contrast: what is held and the peak of its backward pass
    costs = json.loads((out / "comparison.json").read_text())["costs"]["output"]
    assert costs["terms"]["contrast"] == {"peak_bytes": 12 * 2**20, "seconds": 0.02}
    assert "| 50.0 | contrast 12.0 |" in (out / "comparison.md").read_text()


def test_what_cannot_be_measured_does_not_stop_the_comparison(
    launched, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Config, point: object) -> Measured:
        raise InputError("it was killed")

    interrupted(launched, config_file, tmp_path / "out", teacher_weights(config_file))
    monkeypatch.setattr(plan, "measure_in_child", failing)
    text = run_and_compare(config_file, ["output"], tmp_path / "out", teacher_weights(config_file)).read_text()
    assert "Cost of a step" not in text


@pytest.mark.slow  # six trainings, and a process for each method to measure it
@pytest.mark.usefixtures("one_thread")
def test_real_trainings_end_in_a_comparison(config_file: Path, tmp_path: Path) -> None:
    report = run_and_compare(config_file, ["facd"], tmp_path / "out", teacher_weights(config_file), seeds=[0, 1])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(found["sets"]["noise"]) == {"bicubic", "scratch", "output", "facd", "teacher"}
    assert found["differences"] == []
    assert found["arms"]["facd"]["seeds"] == [0, 1]
    assert found["costs"]["facd"]["terms"]["contrast"]["peak_bytes"] > 0
    text = report.read_text()
    for who in ("scratch", "output", "facd"):
        assert f"{found['sets']['noise'][who]['psnr']:.3f} ± " in text
        assert (tmp_path / "out" / f"{who}-seed1" / "report.html").is_file()


COMPARISONS = Path(__file__).parents[2] / "benchmarks" / "comparisons"


DONE = {
    "sr-x4": {"skd", "dckd", "facd"},
    "denoise25": {"skd", "slkd", "dckd", "facd"},
    "derain": {"slkd"},
    "deblur": {"facd"},
}


@pytest.mark.parametrize("recipe", DONE)
def test_runs_that_were_kept_without_their_pictures_can_be_compared_again(recipe: str, tmp_path: Path) -> None:
    found = result(sorted((COMPARISONS / "done" / recipe).iterdir()), tmp_path)
    assert {"scratch", "output", *DONE[recipe]} <= set(found["arms"])
    page = (COMPARISONS.parents[1] / "docs" / "comparison.md").read_text()
    for who, score in found["sets"]["Set5"].items():  # the page has these numbers
        assert f"| {who} | {score['psnr']:.2f} dB, {score['ssim']:.4f} |" in page


@pytest.mark.parametrize("recipe", [*DONE, "deblur-teacher"])
def test_recipes_of_the_comparisons_have_no_problems(shared_data: Path, recipe: str) -> None:
    if shared_data != COMPARISONS.parents[2] / "shared" / "data":
        pytest.skip(f"the recipes take their images from beside the checkout, and these are at {shared_data}")
    methods = [] if recipe == "deblur-teacher" else ["skd", "slkd", "dckd", "facd"]
    configs, refused = applicable(COMPARISONS / f"{recipe}.yaml", methods, [], print)
    assert {"scratch", *methods} <= set(configs) | set(refused)
    assert set(refused) <= ({"slkd"} if recipe == "sr-x4" else {"output"} if recipe == "deblur-teacher" else set())


def test_a_run_is_no_place_for_a_comparison(fake_run, config_file: Path) -> None:
    scratch, facd = fake_run("scratch"), fake_run("facd")
    with pytest.raises(InputError, match=r"--out .*demo-facd is a run folder.*give another folder"):
        compare([scratch, facd], facd)
    with pytest.raises(InputError, match="is a run folder"):
        run_and_compare(config_file, ["output"], facd)
    assert not (facd / "comparison.json").exists()
