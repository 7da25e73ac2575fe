"""A checkpoint is complete or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.checkpoint import Checkpoints, SaveFailed, read_checkpoint
from trainers.errors import InputError


def save(checkpoints: Checkpoints, step: int, *, best: bool = False, size: int = 8) -> None:
    weights = {"student": {"w": torch.full((size,), float(step))}}
    checkpoints.save(step, weights, {"step": step, "nested": {"list": [1, "a", None]}}, best=best)


def steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("step-*"))


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.last() is None
    save(checkpoints, 5)
    last = checkpoints.last()
    assert last is not None
    weights, state = read_checkpoint(last)
    assert torch.equal(weights["student"]["w"], torch.full((8,), 5.0))
    assert state == {"step": 5, "nested": {"list": [1, "a", None]}}
    assert (tmp_path / "last").read_text() == "step-000005\n"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        save(checkpoints, step, best=step == 2)
    assert steps(checkpoints) == ["step-000002", "step-000005", "step-000006"]
    assert (tmp_path / "best").read_text() == "step-000002\n"
    save(checkpoints, 7, best=True)
    assert steps(checkpoints) == ["step-000006", "step-000007"]


def test_the_newest_of_a_million_steps_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-000007-mine").mkdir()
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(checkpoints, step)
    assert steps(checkpoints) == ["step-000007-mine", "step-1000000", "step-1000001"]
    save(checkpoints, 999_999)  # as after a removed checkpoint
    (tmp_path / "last").unlink()
    assert checkpoints.last() == tmp_path / "step-1000001"


def test_saving_a_step_twice(tmp_path: Path) -> None:
    """The last one is left as it is; one that no pointer reached before a kill is made anew."""
    checkpoints = Checkpoints(tmp_path, keep=5)
    save(checkpoints, 1)
    save(checkpoints, 2)
    before = (tmp_path / "step-000002" / "state.pt").stat().st_ino
    save(checkpoints, 2, best=True)
    assert (tmp_path / "step-000002" / "state.pt").stat().st_ino == before
    assert checkpoints.best() == tmp_path / "step-000002"
    (tmp_path / "last").write_text("step-000001\n")
    (tmp_path / "step-000002" / "student.safetensors").write_bytes(b"from before the kill")
    save(checkpoints, 2)
    last = checkpoints.last()
    assert last is not None
    assert last.name == "step-000002"
    assert torch.equal(read_checkpoint(last)[0]["student"]["w"], torch.full((8,), 2.0))
    assert steps(checkpoints) == ["step-000001", "step-000002"]


def test_a_full_disk_leaves_the_previous_one(tmp_path: Path) -> None:
    """A real failing write, by a limit on the size of files."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(
            SaveFailed, match=r"There is no earlier checkpoint: free some space, remove .* and start again"
        ):
            save(checkpoints, 1, size=1_000_000)
        save(checkpoints, 1)
        with pytest.raises(SaveFailed, match=r"step 2 could not be written.*step-000001 is intact.*kdtrain resume"):
            save(checkpoints, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(checkpoints) == ["step-000001"]
    assert checkpoints.last() == tmp_path / "checkpoints" / "step-000001"
    save(checkpoints, 2, size=1_000_000)
    assert checkpoints.last() == tmp_path / "checkpoints" / "step-000002"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match="There is no earlier checkpoint"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=2), 1)


def test_all_of_a_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and the folders that name them, also when the power goes."""
    synced: set[int] = set()
    sync = os.fsync

    def recorded(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        sync(file)

    monkeypatch.setattr(os, "fsync", recorded)
    save(Checkpoints(tmp_path, keep=2), 1, best=True)
    written = [tmp_path, *tmp_path.rglob("*")]
    assert {path.name for path in written if path.stat().st_ino not in synced} == set()
    assert len(written) == 6


def save_in_a_process_killed_at(moment: int, folder: Path) -> int:
    """Saves step 2 in a child process that gets SIGKILL before its `moment`-th fsync or replace; the wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = itertools.count(1)

    def deadly(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)

        return call

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    save(Checkpoints(folder, keep=1), 2, best=True)
    os._exit(0)


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Killed before each write that reaches the disk in turn: the last checkpoint is the old or the new one, complete."""
    found = []
    for moment in itertools.count(1):
        checkpoints = Checkpoints(tmp_path / str(moment), keep=1)
        save(checkpoints, 1)
        status = save_in_a_process_killed_at(moment, checkpoints.folder)
        last = checkpoints.last()
        assert last is not None
        weights, state = read_checkpoint(last)
        assert torch.equal(weights["student"]["w"], torch.full((8,), float(state["step"])))
        found.append(state["step"])
        save(checkpoints, 3)  # whatever the kill left behind is no obstacle
        assert steps(checkpoints)[-1] == "step-000003"
        assert {path.name for path in checkpoints.folder.iterdir()} <= {"last", "best", "step-000002", "step-000003"}
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(found) > 5
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_broken_checkpoint_is_bad_input(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    (tmp_path / "step-000001" / "state.pt").write_bytes(b"no state")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "step-000001")


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads everything, so the refusal is made up."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    opened: Any = Path.open

    def forbidden(self: Path, *arguments: object, **more: object) -> object:
        if self.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError):
        checkpoints.read_last()


def test_a_damaged_checkpoint_says_from_which_to_go_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        checkpoints.read_last()
    for step, instead in ((1, "there is no earlier one"), (2, r"remove .*step-000002 to go on from step-000001")):
        save(checkpoints, step)
        path, weights, state = checkpoints.read_last()
        assert (path.name, list(weights), state["step"]) == (f"step-00000{step}", ["student"], step)
        content = (path / "state.pt").read_bytes()
        (path / "state.pt").write_bytes(b"no state")
        with pytest.raises(InputError, match=instead):
            checkpoints.read_last()
        (path / "state.pt").write_bytes(content)


def test_temporary_files_stay_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR may be another filesystem, full or absent."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    save(Checkpoints(tmp_path / "checkpoints", keep=2), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
