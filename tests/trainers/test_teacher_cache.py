"""A run that reads its teacher's answers from the disk is the run that computes them, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console

from tests.trainers.test_every_method import config as tiny_config
from tests.trainers.tiny import assert_same_state, last_state, metrics, tiny, write_teacher, write_tiny, write_yaml
from trainers.cli import main
from trainers.config import stages
from trainers.config_file import load_config
from trainers.launch import build_loop
from trainers.models import find
from trainers.progress import TrainingProgress
from trainers.run_folder import RunFolder
from trainers.taps import Tapped
from trainers.teacher_cache import CachedTeacher, TeacherCache, call_key, expected_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

CACHED = ("--set", "train.teacher_cache={path: auto}")


def counts(said: str) -> tuple[int, int]:
    """Answers read and computed, as the last run's summary has them."""
    found = re.findall(r"(\d+) answers read, (\d+) computed", said)
    return int(found[-1][0]), int(found[-1][1])


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "teacher-cache").glob("*/*/*.answer"))


@pytest.mark.parametrize(("method", "accumulate"), [("output", 2), ("facd", 1), ("dukd", 1)])
def test_a_cached_run_is_the_same_bit_for_bit(
    tmp_path: Path, method: str, accumulate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cold, then warm: another run with the same seed, as in a comparison of students."""
    config = write_tiny(tmp_path, method, steps=4, accumulate=accumulate)
    runs = tmp_path / "runs"
    assert main(["train", str(config)]) == 0
    for name in ("cold", "warm"):
        assert main(["train", str(config), *CACHED, "--set", f"name={name}"]) == 0
        assert_same_state(last_state(runs / method), last_state(runs / name))
        assert metrics(runs / method) == metrics(runs / name)
        read, computed = counts(capsys.readouterr().err)
        assert (computed == 0) == (name == "warm")
        assert computed + read >= 4 * accumulate


def test_another_student_and_a_resumed_run_compute_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, "output", steps=4, schedule="constant")
    assert main(["train", str(config), *CACHED, "--set", "val.every=2"]) == 0
    assert main(["train", str(config), *CACHED, "--set", "name=other", "--set", "student.features=5"]) == 0
    assert counts(capsys.readouterr().err) == (6, 0)  # 4 steps, and 2 measurements of the shares
    assert main(["train", str(config), "--set", "name=part", "--set", "train.steps=2"]) == 0
    assert main(["resume", str(tmp_path / "runs" / "part"), *CACHED, "--set", "train.steps=4"]) == 0
    assert counts(capsys.readouterr().err) == (3, 0)
    assert_same_state(last_state(tmp_path / "runs" / "output"), last_state(tmp_path / "runs" / "part"))


def test_other_data_and_other_teachers_are_other_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, "output")
    assert main(["train", str(config), *CACHED]) == 0
    assert main(["train", str(config), *CACHED, "--set", "name=seed", "--set", "train.seed=1"]) == 0
    assert counts(capsys.readouterr().err) == (2, 4)
    write_teacher(tmp_path / "other.safetensors", seed=2)
    other = ["--set", "name=other", "--set", "teacher.weights=other.safetensors"]
    assert main(["train", str(config), *CACHED, *other]) == 0
    assert counts(capsys.readouterr().err) == (2, 4)
    assert main(["train", str(config), *CACHED, "--set", "name=bf16", "--set", "train.precision=bf16"]) == 0
    assert counts(capsys.readouterr().err) == (2, 4)


def test_damaged_answers_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, "output")
    assert main(["train", str(config), *CACHED]) == 0
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    assert len(whole) == 4
    flipped, cut, empty, _ = whole
    content = bytearray(whole[flipped])
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(whole[cut][:-7])
    empty.write_bytes(b"")
    assert main(["train", str(config), *CACHED, "--set", "name=again"]) == 0
    assert counts(capsys.readouterr().err) == (3, 3)
    assert_same_state(last_state(tmp_path / "runs" / "output"), last_state(tmp_path / "runs" / "again"))
    assert {path: path.read_bytes() for path in entries(tmp_path)} == whole


def test_a_run_that_would_not_fit_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, "facd", steps=1_000_000)
    assert main(["train", str(config), "--set", "train.teacher_cache={max_size: 1GiB}"]) == 2
    said = capsys.readouterr().err
    assert "train.teacher_cache: the teachers' answers of this run take" in said
    assert "above max_size 1.00 GiB" in said
    assert entries(tmp_path) == []
    assert main(["train", str(config), "--set", "train.teacher_cache={max_size: much}"]) == 2
    assert "give a size such as 8GiB" in capsys.readouterr().err
    (tmp_path / "afile").touch()
    assert main(["train", str(config), "--set", "train.teacher_cache={path: afile}"]) == 2
    assert "afile: File exists: a file is where a folder is needed" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["output", "facd", "dukd", "dckd", "csd", "skd"])
def test_the_estimate_is_what_a_step_asks_for(tmp_path: Path, method: str) -> None:
    config = load_config(tiny_config(tmp_path, method, steps=1, share_every=100))
    cache = TeacherCache(tmp_path / "cache", limit=2**30)
    folder = RunFolder.create(config)
    loop = build_loop(Fabric(accelerator="cpu", devices=1), config, folder, resuming=False, cache=cache)
    folder.close()
    expected = expected_bytes(stages(config), loop.train_step, torch.device("cpu"))
    lq, gt = next(loop._batches())
    loop.position.step = 1  # step 0 also measures the shares, on the same inputs
    loop._step(lq, gt, TrainingProgress(Console(quiet=True), 0, 1, shown=False))
    asked = [t.asked for t in loop.train_step.tapped_teachers.values() if isinstance(t, CachedTeacher)]
    assert sum(asked) == expected > 0


def test_the_estimate_counts_the_steps_of_each_stage(tmp_path: Path) -> None:
    tree = tiny(tmp_path, "output", steps=6)
    tree["data"] |= {"schedule": [{"step": 2, "patch": 24, "batch": 2}, {"step": 3, "patch": 32, "batch": 2}]}
    config = load_config(write_yaml(tmp_path, tree))
    cache, folder = TeacherCache(tmp_path / "cache", limit=2**30), RunFolder.create(config)
    loop = build_loop(Fabric(accelerator="cpu", devices=1), config, folder, resuming=False, cache=cache)
    folder.close()
    images = 2 * (4 * 16**2) + 1 * (2 * 24**2) + 3 * (2 * 32**2)  # steps, samples, pixels: no taps are asked for
    assert expected_bytes(stages(config), loop.train_step, torch.device("cpu")) == images * 3 * 4
    assert loop.train_step.training  # again, after what was tried


def test_a_folder_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "teacher").write_text("where a folder is needed")
    cache = TeacherCache(tmp_path, limit=2**20)
    cache.write("teacher/ab", (torch.zeros(1, 3, 4, 4), {}))
    assert cache.refused == 1


def test_several_writers_share_the_limit(tmp_path: Path) -> None:
    answer = (torch.zeros(1, 3, 16, 16), {"tap": torch.ones(1, 4, 8, 8)})
    cache = TeacherCache(tmp_path / "one", limit=2**20)
    cache.write("teacher/ab", answer)
    room = 2 * cache.size
    for writers, kept in ((2, 1), (3, 0)):
        cache = TeacherCache(tmp_path / str(writers), limit=room, writers=writers)
        for key in ("teacher/ab", "teacher/cd"):
            cache.write(key, answer)
        assert (len(list(cache.folder.rglob("*.answer"))), cache.refused) == (kept, 2 - kept)


def test_the_folder_never_outgrows_its_limit(tmp_path: Path) -> None:
    answer = (torch.zeros(1, 3, 16, 16), {"tap": torch.ones(1, 4, 8, 8)})
    cache = TeacherCache(tmp_path, limit=8000)
    keys = [f"teacher/{call_key(torch.full((1, 3, 8, 8), float(value)))}" for value in range(3)]
    for key in keys:
        cache.write(key, answer)
    assert cache.refused == 2
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.answer")) <= 8000
    assert TeacherCache(tmp_path, limit=8000).size == pytest.approx(cache.size, abs=64)
    found = cache.read(keys[0])
    assert found is not None
    assert torch.equal(found[1]["tap"], answer[1]["tap"])
    assert "2 of them not kept: no space" in cache.summary()


def test_an_answer_keeps_its_memory_layout(tmp_path: Path) -> None:
    """Other strides could mean another order of summation behind it."""
    output = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    taps = {"view": torch.rand(2, 8, 9, 9)[:, :4, :8, :8]}
    cache = TeacherCache(tmp_path, limit=2**20)
    cache.write("teacher/ab", (output, taps))
    found = cache.read("teacher/ab")
    assert found is not None
    assert torch.equal(found[0], output)
    assert torch.equal(found[1]["view"], taps["view"])
    assert found[0].stride() == output.stride()
    assert found[1]["view"].stride() == taps["view"].stride()


def test_keys_tell_apart_what_may_change_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = find("edsr")
    options = entry.options(scale=2, features=4, blocks=1)
    network = entry.build(options)
    cache = TeacherCache(tmp_path, limit=0)
    tapped = Tapped(network, {})
    teachers = [CachedTeacher(tapped, "a", cache), CachedTeacher(tapped, "b", cache)]
    teachers.append(CachedTeacher(Tapped(network, {"head": "head"}), "a", cache))
    torch.set_num_threads(2)
    teachers.append(CachedTeacher(tapped, "a", cache))
    torch.set_num_threads(1)
    with torch.no_grad():
        next(network.parameters()).add_(1e-6)
    teachers.append(CachedTeacher(tapped, "a", cache))
    monkeypatch.setattr(torch, "__version__", "another")
    teachers.append(CachedTeacher(tapped, "a", cache))
    monkeypatch.setattr("inspect.getsource", lambda module: "other code")
    teachers.append(CachedTeacher(tapped, "a", cache))
    assert len({teacher.identity for teacher in teachers}) == len(teachers)
    x = torch.rand(2, 3, 8, 8)
    inputs = [x, x + 1e-7, x[:1], x.contiguous(memory_format=torch.channels_last), x.flip(3), x.double()]
    assert len({call_key(given) for given in inputs}) == len(inputs)
    outside = call_key(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert call_key(x) != outside
