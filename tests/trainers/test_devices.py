"""Several processes, however they are started and whenever they take over, train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.trainers.test_every_method import config as tiny_config
from tests.trainers.test_loop import assert_same_training
from tests.trainers.tiny import last_state, write_tiny
from trainers.cli import main
from trainers.config import Train
from trainers.devices import device_problems
from trainers.loop import STEPS_BETWEEN_AGREEMENTS

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


def slurm(*arguments: str) -> list[subprocess.Popen[str]]:
    """kdtrain in two processes with the variables of srun --ntasks=2."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "trainers", *arguments, *TWO]
    return [
        subprocess.Popen(
            command,
            env=os.environ | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and stderr."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, errors) for process, errors in zip(processes, said, strict=True)]


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
    two = ended(slurm("resume", str(tmp_path / "runs" / "part"), "--set", "train.steps=6"))
    assert [code for code, _ in two] == [0, 0], two
    assert_same_training(tmp_path / "runs" / "dckd", tmp_path / "runs" / "part")


def test_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    """A scheduler may reach only one of them; the other would wait for its gradients forever."""
    config = write_tiny(tmp_path, steps=1_000_000, log_every=5)
    run, processes = tmp_path / "runs" / "scratch", slurm("train", str(config))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].terminate()
    two = ended(processes)
    assert [code for code, _ in two] == [130, 130], two
    step = last_state(run)[".state.step"]
    assert step % STEPS_BETWEEN_AGREEMENTS == 0
    assert "the state is saved" in two[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "strategy"),
    # DCKD starts where its history model is the student: gathered weights round differently, and there |a - b| has its kink.
    [("dckd", "ddp"), *((method, strategy) for method in ("skd", "csd", "slkd") for strategy in ("ddp", "fsdp"))],
)
def test_two_processes_change_nothing_for_any_method(tmp_path: Path, method: str, strategy: str) -> None:
    config = tiny_config(tmp_path, method, steps=6)
    assert main(["train", str(config)]) == 0
    two = torchrun("train", str(config), "--set", "name=two", "--set", f"train.strategy={strategy}")
    assert two.returncode == 0, two.stderr
    assert_same_training(tmp_path / "runs" / method, tmp_path / "runs" / "two")


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, steps=2)
    odd = torchrun("train", str(config), "--set", "data.batch=3")
    assert odd.returncode != 0
    assert odd.stderr.count("3 does not divide into 2 devices x 1 micro-batches: make it a multiple of 2") == 1
    assert not (tmp_path / "runs" / "scratch" / "config.yaml").exists()


FSDP = ("--set", "train.strategy=fsdp")


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    """Three steps of two micro-batches on two devices with parts of the student; then one process. A share is measured in between."""
    options = {"share_every": 2, "accumulate": 2, "clip": 1.0, "schedule": "constant", "log_every": 1}
    config = write_tiny(tmp_path, "facd", steps=6, save_every=3, **options)
    share = ["--set", "method.weights.contrast={share: 0.2}"]
    assert main(["train", str(config), *share]) == 0
    two = torchrun("train", str(config), *share, *FSDP, "--set", "name=two", "--set", "train.steps=3")
    assert two.returncode == 0, two.stderr
    back = ["--set", "train.devices=1", "--set", "train.strategy=ddp", "--set", "train.steps=6"]
    assert main(["resume", str(tmp_path / "runs" / "two"), *back]) == 0
    assert_same_training(tmp_path / "runs" / "facd", tmp_path / "runs" / "two")


def test_sharding_takes_over(tmp_path: Path) -> None:
    """One process, three steps, after which DCKD's history model moves to the gathered student; then two that share it."""
    config = tiny_config(tmp_path, "dckd", steps=6, save_every=3, schedule="constant", log_every=1, ema=None)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--set", "name=part", "--set", "train.steps=3"]) == 0
    two = torchrun("resume", str(tmp_path / "runs" / "part"), *FSDP, "--set", "train.steps=6")
    assert two.returncode == 0, two.stderr
    assert_same_training(tmp_path / "runs" / "dckd", tmp_path / "runs" / "part")


def test_one_device_shares_with_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_tiny(tmp_path)), *FSDP]) == 2
    assert "fsdp shares the student among devices, and this is one: choose ddp" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(write_tiny(tmp_path)), "--set", "train.accelerator=cuda"]) == 2
    assert "train.accelerator: cuda, but torch finds no such device here" in capsys.readouterr().err


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_problems(Train(steps=1, devices=2)) == []
    assert device_problems(Train(steps=1, strategy="fsdp")) == []
    assert "choose at most 2" in device_problems(Train(steps=1, devices=3))[0]


def test_machines_without_a_launcher_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["train", str(write_tiny(tmp_path)), "--set", "train.nodes=2"]) == 2
    assert "train.nodes: 2, but no launcher has started this process" in capsys.readouterr().err
