"""Configs: every mistake is found at once, in its place, with the name that was meant."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import save_file

from trainers import starter
from trainers.config import Config
from trainers.config_file import changes, dump_config, load_config, read_config
from trainers.errors import InputError
from trainers.methods import METHODS
from trainers.methods.facd import FACDOptions
from trainers.methods.scratch import ScratchOptions
from trainers.tasks import TASKS

RECIPES = Path(starter.__file__).parent / "recipes"

GOOD = """\
name: good
teacher: {arch: edsr, weights: teacher.safetensors}
student: {arch: edsr, features: 16}
method: {name: facd, adaptive: false}
train: {steps: 10}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The problems of a config, without the folder."""
    return [problem.removeprefix(f"{folder}/") for problem in read_config(write(folder, text), overrides).problems]


def test_a_good_config_and_its_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert isinstance(config.method, FACDOptions)
    assert config.method.weights.contrast == 0.015
    assert config.student.features == 16
    assert config.student.scale == config.scale == 2
    assert config.teacher is not None
    assert config.teacher.weights == str(tmp_path / "teacher.safetensors")  # relative to the file


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("nosuch.pth", "its weights do not tell it: {folder}/nosuch.pth: there are no weights"),
        ("run.yaml", "its weights do not tell it: {folder}/run.yaml: cannot be read as weights"),
        (
            "foreign.safetensors",
            "its weights do not tell it: {folder}/foreign.safetensors: these weights fit none of our",
        ),
    ],
)
def test_weights_that_do_not_tell_their_network_are_named(tmp_path: Path, weights: str, said: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (found,) = problems(tmp_path, GOOD.replace("arch: edsr, weights: teacher.safetensors", f"weights: {weights}"))
    assert found.startswith("run.yaml:2:1: teacher.arch: is missing, and ")
    assert said.format(folder=tmp_path) in found


def test_a_slice_of_the_teacher_is_no_file_that_tells_arch(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD.replace("arch: edsr, features: 16", "weights: teacher"))
    assert found == "run.yaml:3:1: student.arch: is missing"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = """\
name: bad
studnt: {arch: edsr}
student: {arch: edsr, feature: 16}
teacher: {arch: edsr, weights: x.pth}
data:
  batch: 2.0
  train: {gt: folder, ql: other}
  val: [{name: a, gt: photos, lqs: x}]
method:
  name: facd
  adaptiv: true
  weights: {contrast: {shar: 0.1}}
train: {steps: ten, devices: []}
"""
    assert set(problems(tmp_path, text)) == {
        "run.yaml:2:1: studnt: unknown key; did you mean student?",
        "run.yaml:3:23: student.feature: unknown key; did you mean features?",
        "run.yaml:6:3: data.batch: Input should be a valid integer, but is 2.0",
        "run.yaml:7:23: data.train.ql: unknown key; known here: gt, lq, lq_template, exclude",
        "run.yaml:8:31: data.val.0.lqs: unknown key; did you mean lq?",
        "run.yaml:11:3: method.adaptiv: unknown key; did you mean adaptive?",
        "run.yaml:12:13: method.weights.contrast.share: is missing",
        "run.yaml:12:24: method.weights.contrast.shar: unknown key; did you mean share?",
        "run.yaml:13:9: train.steps: Input should be a valid integer, but is 'ten'",
        "run.yaml:13:21: train.devices: must be auto or a number, but is []",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("name: fcd", "run.yaml:4:10: method.name: there is no fcd; did you mean facd?"),
        ("nome: facd", "run.yaml:4:1: method.name: is missing"),
        ("name: facd, weights: {contrast: strong}", "run.yaml:4:32: method.weights.contrast: must be a number"),
    ],
)
def test_the_method_block(tmp_path: Path, change: str, said: str) -> None:
    found = problems(tmp_path, GOOD.replace("name: facd, adaptive: false", change))
    assert any(problem.startswith(said) for problem in found), found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.batch=1"], "--set data.batch=1: data.batch: method facd relates patches of a batch: 1 is below 2"),
        (["train.milestones=[5]"], "train.milestones: a step schedule has milestones, and the others have none"),
        (["train.accumulate=3"], "--set train.accumulate=3: train.accumulate: 3 does not divide the batch of 16"),
        (["data.patch=95"], "--set data.patch=95: data.patch: 95 is not a multiple of 2"),
        (["teacher=null"], "--set teacher=null: teacher: method facd needs a teacher"),
        (["teacher.weights=null"], "teacher: a teacher needs trained weights"),
        (["student.scale=4"], "--set student.scale=4: student.scale: 4, but the run's scale is 2"),
        (["method.weights.pixel={share: 1}"], "method.weights.pixel: shares are measured against the pixel term"),
        (["train.lr=1.0e-7"], "train.lr_min: 1e-06 is above train.lr, 1e-07, to which the rate would rise"),
        (
            ["method.weights.output={value: 1.0, final: 0.1}"],
            "method.weights.output: Value error, final: 0.1 is reached after `decay` steps: give decay",
        ),
        (["method.weights.output={value: 1.0, final: 0.0}"], "final: 0 is reached after `decay` steps"),
        (["method.weights.output={value: 1.0, final: 0.1, decay: 0}"], "final: 0.1 is reached after `decay` steps"),
        (["scale=1"], "--set scale=1: scale: 1 does not belong to task sr: give 2, 3, 4 or 8"),
        (["task=denoise", "scale=2"], "--set scale=2: scale: 2 does not belong to task denoise: leave it out"),
        (["data.degradation={name: noise}"], "data.train: noise keeps the size of an image, but the scale is 2"),
        (
            ["data.degradation=null"],
            "data.val: nothing makes the inputs: give lq, a folder of them, or data.degradation",
        ),
        (["data.degradation={name: nois}"], "data.degradation.name: there is no nois; did you mean noise?"),
        (
            ["task=denoise", "data.degradation={name: noise, sigma: [50, 0]}"],
            "data.degradation.sigma: Value error, the least comes first: write [0, 50]",
        ),
        (
            ["task=denoise", "data.degradation={name: noise, sigma: high}"],
            "data.degradation.sigma: must be a number or [least, most], but is 'high'",
        ),
        (["task=dehaze"], "data.train: nothing makes the inputs: give lq"),
        (["task=denoise", "data.grey=true"], "data.grey: the student sees colour images: set data.grey to false"),
        (
            ["task=denoise", "data.grey=true", "val.protocol=denoise-rgb"],
            "val.protocol: denoise-rgb is not for grey images: denoise-grey",
        ),
        (["val.tile=40"], "val.tile: does not fit the student: overlap must be"),
        (["data.train=[{gt: a}, {gd: b}]"], "data.train.1.gd: unknown key; known here: gt, lq"),
        (["data.train=7"], "data.train: must be photos, {gt: folder"),
        (["task=denose"], "--set task=denose: task: Input should be 'sr', 'denoise'"),
        (["train.step=10"], "--set train.step=10: train.step: unknown key; did you mean steps?"),
        (["train.lr=fast"], "--set train.lr=fast: train.lr: Input should be a valid number"),
        (["train.ema=1"], "--set train.ema=1: train.ema: Input should be less than 1"),
        (["scale=5"], "--set scale=5: scale: Input should be 1, 2, 3, 4 or 8"),
        (["train.lr=${nowhere}"], "nowhere"),
        (["train.steps"], "--set train.steps: write it as --set key.of.the.config=value"),
        (["name.first=x"], "--set name.first=x: "),
        (["data.val=[{name: a, gt: photos}, {name: a, gt: photos}]"], "data.val: two sets are called a"),
    ],
)
def test_what_an_override_breaks(tmp_path: Path, overrides: list[str], said: str) -> None:
    found = problems(tmp_path, GOOD, *overrides)
    assert any(said in problem for problem in found), found


def test_a_rate_and_a_weight_that_fall(tmp_path: Path) -> None:
    weight = "method.weights.output={value: 1.0, final: 0.1, decay: 5}"
    assert problems(tmp_path, GOOD, "train.lr=1.0e-7", "train.lr_min=0.0", weight) == []
    assert problems(tmp_path, GOOD, "train.lr=1.0e-7", "train.schedule=constant") == []
    plain = load_config(write(tmp_path, GOOD), ["method.weights.output={value: 1.0}"])
    assert problems(tmp_path, dump_config(plain)) == []


def test_overrides_are_typed(tmp_path: Path) -> None:
    overrides = [
        "train.lr=3e-4",
        "train.warmup=${train.steps}",
        "train.ema=null",
        "data.val[0].name=other",
        "method.weights.contrast={share: 0.1}",
    ]
    config = load_config(write(tmp_path, GOOD + "data: {val: [{name: a, gt: photos}]}\n"), overrides)
    assert (config.train.lr, config.train.ema, config.data.val[0].name) == (3e-4, None, "other")
    assert config.train.warmup == 10
    assert "train.lr: 0.0002 -> 0.0003" in changes(load_config(tmp_path / "run.yaml"), config)


def test_another_method_drops_the_old_keys_and_says_so(tmp_path: Path) -> None:
    text = GOOD.replace("adaptive: false", "adaptive: false, weights: {pixel: 1.0, contrast: 0.1}")
    reading = read_config(write(tmp_path, text), ["method.name=scratch"])
    assert reading.problems == []
    assert reading.config is not None
    assert isinstance(reading.config.method, ScratchOptions)
    assert reading.config.method.weights.pixel == 1.0
    assert reading.notes == ["method scratch has no adaptive, weights.contrast: dropped from the file's method block"]


@pytest.mark.parametrize("task", TASKS)
def test_the_task_fills_in_what_is_not_given(tmp_path: Path, task: str) -> None:
    pairs = ["data={train: {gt: a, lq: b}, val: [{name: a, gt: a, lq: b}]}"] if task == "dehaze" else []
    config = load_config(write(tmp_path, GOOD), [f"task={task}", *pairs])
    expected = TASKS[task]
    assert (config.scale, config.val.protocol, config.data.degradation) == (
        expected.scale,
        expected.protocol,
        expected.degradation,
    )
    assert config.student.scale == config.scale
    given = load_config(write(tmp_path, GOOD), [f"task={task}", "val.protocol=derain-y", *pairs])
    assert given.val.protocol == "derain-y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "run.yaml:1:8: not valid YAML"),
        ("name: a\nout: b\x07\n", "run.yaml:2: not valid YAML: the character '\\x07': remove it"),
        ("name: a\nname: b", "not valid YAML: found duplicate key name"),
        ("- a", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("name: ${nowhere}\n", "nowhere"),
        ("name: ../elsewhere\n", "name: String should match pattern"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")


# What says that a method is for super-resolution alone, or for tasks that keep the size alone.
ONE_KIND_OF_TASK = {"dukd": "zooms with a network that upscales", "slkd": "same-size tasks only"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_config_goes_round(tmp_path: Path, method: str, task: str) -> None:
    path = tmp_path / "run.yaml"
    if (method == "dukd") == (TASKS[task].scale == 1) and method in ONE_KIND_OF_TASK:
        with pytest.raises(InputError, match=ONE_KIND_OF_TASK[method]):
            starter.write_starter(path, task, method)
        return
    starter.write_starter(path, task, method)
    config = load_config(path)
    assert (config.method.name, config.task) == (method, task)
    assert (config.data.degradation, config.val.protocol) == (TASKS[task].degradation, TASKS[task].protocol)
    path.write_text(dump_config(config))
    assert load_config(path) == config
    with pytest.raises(InputError, match="exists already"):
        starter.write_starter(path, task, method)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    load_config(recipe)


def test_every_key_is_described() -> None:
    schema = json.loads(starter.schema())
    sections = [schema, *schema["$defs"].values()]
    bare = [
        f"{section.get('title')}.{name}"
        for section in sections
        for name, field in section.get("properties", {}).items()
        if not field.get("description", "").endswith(".") and "$ref" not in field
    ]
    assert bare == []
    assert all(section.get("description") for section in sections)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
    )
)
def test_no_value_crashes_the_reader(value: Any) -> None:
    """Whatever stands at a key, the answer is a config or a list of problems."""
    tree = yaml.safe_load(GOOD)
    for key in ("data", "method", "train", "student", "scale"):
        with tempfile.TemporaryDirectory() as folder:
            reading = read_config(write(Path(folder), yaml.safe_dump(tree | {key: value})))
        assert reading.config is not None or reading.problems


def test_sections_do_not_change() -> None:
    assert issubclass(Config, BaseModel)
    assert Config.model_config["frozen"]
    assert Config.model_config["extra"] == "forbid"
