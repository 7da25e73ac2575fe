"""What a second process changes: steps a second, bytes exchanged in a step, peak memory. `python -m benchmarks.devices [METHOD ...]`

Trains the demo for 20 and for 60 steps, in one process with two threads, in one with one thread, and in two with one thread each, which
hold the student each or share it (fsdp). Bytes are those of the loopback interface, the longer run less the shorter: run it on a machine
that is otherwise quiet.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "trainers" / "recipes" / "demo.yaml"
SHORT, LONG = 20, 60


def loopback() -> int:
    """Bytes received on the loopback interface."""
    (line,) = [text for text in Path("/proc/net/dev").read_text().splitlines() if text.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def train(folder: Path, method: str, processes: int, threads: int, strategy: str, steps: int) -> tuple[float, int]:
    """(steps a second in the second half, bytes on loopback) of one run."""
    name = f"{method}-{processes}-{threads}-{strategy}-{steps}"
    settings = [f"name={name}", f"out={folder}", f"method.name={method}", f"train.devices={processes}"]
    settings += [f"train.strategy={strategy}"]
    settings += [f"train.steps={steps}", f"train.log_every={steps // 2}", "train.warmup=0", "val.save_images=0"]
    settings += ["train.share_every=1000000", "train.accelerator=cpu"]
    command = [sys.executable, "-m", "trainers", "train", str(RECIPE), *(p for s in settings for p in ("--set", s))]
    before = loopback()
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True)
    lines = [json.loads(text) for text in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["steps_per_second"] for line in lines if line["kind"] == "train"][-1], loopback() - before


def main(methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for method in methods:
            for case in ((1, 2, "ddp"), (1, 1, "ddp"), (2, 1, "ddp"), (2, 1, "fsdp")):
                _, few = train(Path(place), method, *case, SHORT)
                rate, many = train(Path(place), method, *case, LONG)
                exchanged = (many - few) / (LONG - SHORT)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
                print(
                    f"{method}: {case[0]} x {case[1]} threads, {case[2]}: {rate:.2f} steps/s, {exchanged / 1024:.1f} KiB/step on loopback, "
                    f"largest process so far {peak:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or ["output", "facd"])
