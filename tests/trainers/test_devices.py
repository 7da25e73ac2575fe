"""Several processes, however they are started and whenever they take over, train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.test_every_method import config as tiny_config
from tests.trainers.test_loop import assert_same_training
from tests.trainers.tiny import write_tiny
from trainers.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ("--set", "train.devices=2")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """kdtrain in two processes of one machine."""
    where = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "trainers", *arguments, *TWO]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def slurm(*arguments: str) -> list[tuple[int, str]]:
    """kdtrain in two processes with the variables of srun --ntasks=2; exit codes and stderr."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "trainers", *arguments, *TWO]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    return [(process.wait(), errors) for process in processes for _, errors in [process.communicate(timeout=300)]]


def test_two_processes_hand_over_to_one(tmp_path: Path) -> None:
    """torchrun, three steps; then one process. FACD's negatives are everybody's."""
    config = write_tiny(tmp_path, "facd", steps=6, save_every=3, schedule="constant", log_every=1)
    assert main(["train", str(config)]) == 0
    two = torchrun("train", str(config), "--set", "name=two", "--set", "train.steps=3")
    assert two.returncode == 0, two.stderr
    back = ["--set", "train.devices=1", "--set", "train.steps=6"]
    assert main(["resume", str(tmp_path / "runs" / "two"), *back]) == 0
    assert_same_training(tmp_path / "runs" / "facd", tmp_path / "runs" / "two")


def test_one_process_hands_over_to_two(tmp_path: Path) -> None:
    """One process, three steps, after which DCKD's history model moves; then srun's variables."""
    config = tiny_config(tmp_path, "dckd", steps=6, save_every=3, schedule="constant", log_every=1)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=part", "--set", "train.steps=3"]) == 0
    ended = slurm("resume", str(tmp_path / "runs" / "part"), "--set", "train.steps=6")
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_training(tmp_path / "runs" / "dckd", tmp_path / "runs" / "part")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dckd", "skd", "csd", "slkd"])
def test_two_processes_change_nothing_for_any_method(tmp_path: Path, method: str) -> None:
    config = tiny_config(tmp_path, method, steps=6)
    assert main(["train", str(config)]) == 0
    two = torchrun("train", str(config), "--set", "name=two")
    assert two.returncode == 0, two.stderr
    assert_same_training(tmp_path / "runs" / method, tmp_path / "runs" / "two")


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, steps=2)
    odd = torchrun("train", str(config), "--set", "data.batch=3")
    assert odd.returncode != 0
    assert odd.stderr.count("3 does not divide into 2 devices x 1 micro-batches: make it a multiple of 2") == 1
    assert not (tmp_path / "runs" / "scratch" / "config.yaml").exists()


def test_sharded_students_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_tiny(tmp_path)), "--set", "train.strategy=fsdp"]) == 2
    assert "torch lets nobody copy a sharded network: choose ddp" in capsys.readouterr().err
