"""Micro-batches and patch schedules: the batch stays what users set, whatever fits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainers.tiny import assert_same_state, last_state, metrics, tiny, write_tiny, write_yaml
from trainers.cli import main
from trainers.config import stages
from trainers.config_file import load_config
from trainers.errors import OutOfMemory, out_of_memory
from trainers.launch import resume, train
from trainers.methods import Batch
from trainers.step import TrainStep


def limit_memory(monkeypatch: pytest.MonkeyPatch, samples: int) -> list[int]:
    """Let training steps of more samples fail as the CPU's allocator does; the sizes that were tried."""
    tried: list[int] = []
    forward = TrainStep.forward

    def limited(self: TrainStep, batch: Batch) -> dict[str, Tensor]:
        if torch.is_grad_enabled() and type(batch.lq) is Tensor:
            tried.append(len(batch.lq))
            if len(batch.lq) > samples:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "forward", limited)
    return tried


@pytest.mark.parametrize("method", ["scratch", "facd"])
def test_memory_that_runs_out_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "limited").mkdir()
    # No share is measured: it would be of the larger micro-batch in the first attempt.
    plain = last_state(train(load_config(write_tiny(tmp_path / "plain", method, accumulate=4, share_every=1000))))
    tried = limit_memory(monkeypatch, 1)
    run = train(load_config(write_tiny(tmp_path / "limited", method, share_every=1000)))
    assert_same_state(plain, last_state(run))
    assert max(tried) == 4
    memory = [line for line in metrics(run) if line["kind"] == "memory"]
    assert memory == [{"kind": "memory", "step": 0, "micro_batch": size} for size in (2, 1)]


def test_a_sample_that_does_not_fit_names_what_takes_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 0)
    assert main(["train", str(write_tiny(tmp_path, "facd"))]) == 3
    message = capsys.readouterr().err
    assert "out of memory with a single sample: most is taken by" in message
    assert "lower data.patch" in message


def test_a_method_that_cannot_be_split_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_tiny(tmp_path, "facd"))
    monkeypatch.setattr(type(config.method), "indivisible", "it needs the whole batch")
    limit_memory(monkeypatch, 2)
    with pytest.raises(OutOfMemory, match="method facd takes no micro-batches: it needs the whole batch"):
        train(config)


def test_other_errors_pass() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))


# --- progressive patches -----------------------------------------------------------------------------------------------------------


def scheduled(folder: Path, schedule: list[dict[str, Any]], **changes: Any) -> Path:
    tree = tiny(folder, "scratch", steps=6, save_every=2)
    tree["data"] |= {"schedule": schedule}
    return write_yaml(folder, tree | changes)


def test_later_stages_train_on_other_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = TrainStep.forward

    def recorded(self: TrainStep, batch: Batch) -> dict[str, Tensor]:
        seen.append(tuple(batch.gt.shape[::2]))
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "forward", recorded)
    later = [{"step": 2, "patch": 24, "batch": 2}, {"step": 3, "patch": 32, "batch": 2, "accumulate": 2}]
    config = load_config(scheduled(tmp_path, later))
    assert [(first, stage.data.patch, stage.data.batch) for first, stage in stages(config)] == [
        (0, 16, 4),
        (2, 24, 2),
        (3, 32, 2),
    ]
    train(config)
    assert seen == [(4, 16)] * 2 + [(2, 24)] + [(1, 32)] * 6


def test_a_resume_within_a_later_stage_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = [{"step": 3, "patch": 24, "batch": 2}]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = last_state(train(load_config(scheduled(tmp_path / "whole", later))))
    forward, calls = TrainStep.forward, iter(range(100))

    def stopped(self: TrainStep, batch: Batch) -> dict[str, Tensor]:
        if next(calls) == 5:
            raise KeyError("stop")
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "forward", stopped)
    config = load_config(scheduled(tmp_path / "stopped", later))
    with pytest.raises(KeyError, match="stop"):
        train(config)
    monkeypatch.undo()
    assert_same_state(whole, last_state(resume(Path(config.out) / config.name)))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([{"step": 2, "patch": 17}], "data.schedule.0: data.patch: 17 is not a multiple of 2"),
        ([{"step": 2, "patch": 24, "batch": 3, "accumulate": 2}], "2 does not divide the batch of 3"),
        ([{"step": 4, "patch": 24}, {"step": 2, "patch": 32}], "its steps [4, 2] must grow"),
        ([{"step": 6, "patch": 24}], "stay below train.steps, 6"),
    ],
)
def test_every_stage_is_checked_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: list[dict[str, Any]], message: str
) -> None:
    path = scheduled(tmp_path, schedule)
    assert main(["train", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_images_must_be_large_enough_for_the_largest_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(scheduled(tmp_path, [{"step": 2, "patch": 64}]))]) == 2
    assert "64" in capsys.readouterr().err
