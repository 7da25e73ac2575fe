"""Files of weights say whose they are: by their metadata, by the run that they are a checkpoint of, or by keys and shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.trainers.tiny import write_tiny
from trainers.architectures import EDSRNetwork
from trainers.cli import main
from trainers.config_file import load_config
from trainers.errors import InputError
from trainers.launch import train
from trainers.networks import build_network
from trainers.sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has an option that its weights do not tell."""
    config = write_tiny(tmp_path_factory.mktemp("trained"))
    return train(load_config(config, ["student.res_scale=0.1"]))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-000004"


def forget(run: Path) -> None:
    """Makes the run's checkpoint one of an earlier version, without metadata."""
    for file in checkpoint(run).glob("*.safetensors"):
        save_file(load_file(file), file)


def res_scale(source: Path) -> float:
    return float(open_source(source).options.res_scale)


def as_teacher(weights: Path, folder: Path) -> float:
    """The res_scale of a teacher of which a config gives the weights alone."""
    config = write_tiny(folder, "output")
    teacher = load_config(config, [f"teacher={{weights: {weights}}}"]).teacher
    assert isinstance(teacher, EDSRNetwork)
    return teacher.res_scale


def test_weights_of_a_run_are_those_of_the_network_that_was_trained(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    shutil.copy(checkpoint(run) / "ema.safetensors", moved)
    for source in (run, checkpoint(run), checkpoint(run) / "student.safetensors", moved):
        assert res_scale(source) == 0.1
    assert as_teacher(checkpoint(run), tmp_path) == as_teacher(moved, tmp_path) == 0.1
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--size", "16x24"]) == 0
    assert res_scale(tmp_path / "out" / "model.safetensors") == 0.1
    assert "res_scale 0.1" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_without_metadata_is_that_of_its_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(run)
    for source in (run, checkpoint(run), checkpoint(run) / "ema.safetensors"):
        assert res_scale(source) == 0.1
    assert as_teacher(checkpoint(run), tmp_path) == 0.1
    monkeypatch.chdir(checkpoint(run))
    assert res_scale(Path("ema.safetensors")) == 0.1
    assert main(["resume", str(run), "--set", "train.steps=5"]) == 0


def test_what_does_not_fit_is_compared_with_what_the_file_says(run: Path, tmp_path: Path) -> None:
    network = f"teacher={{arch: edsr, features: 5, blocks: 3, weights: {checkpoint(run)}}}"
    teacher = load_config(write_tiny(tmp_path, "output"), [network]).teacher
    assert teacher is not None
    with pytest.raises(InputError, match="has features 4, but the config says features 5"):
        build_network(teacher, "teacher")


def test_a_config_that_overrules_what_weights_were_trained_with_is_noted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = write_tiny(tmp_path, "output"), checkpoint(run)
    teacher = f"teacher={{arch: edsr, features: 4, blocks: 3, res_scale: 0.3, weights: {weights}}}"
    note = (
        f"note: teacher.weights: {weights} was trained with res_scale 0.1; taken is res_scale 0.3, as the config says"
    )
    assert main(["check", str(config), "--set", teacher]) == 0
    assert note in capsys.readouterr().out
    assert main(["train", str(config), "--set", teacher, "--set", "train.steps=1"]) == 0
    assert note in capsys.readouterr().out
    assert main(["check", str(config), "--set", teacher.replace("0.3", "0.1")]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_pointer_to_a_checkpoint_says_what_to_give(run: Path) -> None:
    for pointer in ("best", "last"):
        with pytest.raises(InputError, match=f"names a checkpoint: give {checkpoint(run)}"):
            open_source(run / "checkpoints" / pointer)


@pytest.mark.parametrize("config", ["no: {yaml", "student: edsr", "student: {arch: mine}", "- 1"])
def test_where_no_run_tells_keys_and_shapes_do(run: Path, config: str) -> None:
    forget(run)
    (run / "config.yaml").write_text(config)
    assert res_scale(checkpoint(run)) == 1.0


def test_options_of_another_version_are_refused(run: Path, tmp_path: Path) -> None:
    file = checkpoint(run) / "ema.safetensors"
    save_file(load_file(file), file, {"arch": "edsr", "options": '{"features": 4, "width": 9}'})
    with pytest.raises(InputError, match=r"ema.safetensors: its options of EDSR .* \(width: Extra inputs"):
        open_source(checkpoint(run))
    network = f"teacher={{arch: edsr, features: 4, blocks: 3, weights: {file}}}"
    config = write_tiny(tmp_path, "output")
    assert main(["check", str(config), "--set", network]) == 2
