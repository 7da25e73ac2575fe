"""What `kdtrain plan` says of every method, written to docs/plan.md. `python -m benchmarks.plans [CASE ...]`

Runs the cases named (all without a name) of benchmarks/plans.yaml, keeps what they gave in benchmarks/plans.json, and writes the page from
it. A step that would take longer than LONGEST seconds is simulated. Nothing else should run: `chrt -f 10` keeps other work away.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from trainers.config import Config, contradictions
from trainers.config_file import load_config
from trainers.methods import METHODS
from trainers.plan import BACKENDS, Planner, Point

HERE = Path(__file__).parent
CONFIG, FOUND, PAGE = HERE / "plans.yaml", HERE / "plans.json", HERE.parent / "docs" / "plan.md"
PATCHES = (128, 256, 512)
MEMORY, LONGEST = 4 * 2**30, 60.0
MIB = 2**20

EDSR = [
    "task=sr",
    "scale=2",
    "data.degradation={name: bicubic}",
    "teacher={arch: edsr, weights: 'builtin:edsr-x2'}",
    "student={arch: edsr, features: 16, blocks: 4}",
]
NAFNET = [
    "teacher={arch: nafnet, weights: ../releases/nafnet-derain.safetensors}",
    "student={arch: nafnet, width: 8, encoder_blocks: [1, 1, 1, 2], middle_blocks: 1, decoder_blocks: [1, 1, 1, 1]}",
]
CASES = {name: [f"method={{name: {name}}}"] for name in METHODS}
CASES["dukd"] += EDSR  # zooms in on an image, which super-resolution alone allows
CASES |= {
    "facd, EDSR, batch of 8": ["method={name: facd}", *EDSR, "data.batch=8"],
    "slkd, NAFNet": ["method={name: slkd}", *NAFNET],
}


def config_of(case: str) -> Config:
    smallest = METHODS[case.split(",")[0]][0].smallest_batch
    return load_config(CONFIG, [f"data.batch={smallest}", *CASES[case]])


def run(case: str) -> dict[str, Any]:
    """Patch -> backend -> what was planned, and what was predicted before it was measured."""
    planner, found = Planner(config_of(case), MEMORY, LONGEST), {}
    for patch in PATCHES:
        assert not contradictions(planner.config)
        found[str(patch)] = {backend: _plan(planner, patch, backend) for backend in BACKENDS}
    return {"batch": planner.config.data.batch, "student": planner.config.student.arch, "patches": found}


def _plan(planner: Planner, patch: int, backend: str) -> dict[str, Any]:
    point = Point(patch, planner.config.data.batch, False, backend)
    predicted, plan = planner.predict(point), planner.plan(point)
    return {
        "measured": plan.measured,
        "peak": plan.peak,
        "seconds": plan.seconds,
        "predicted": {"peak": predicted.peak, "seconds": predicted.seconds},
        "parts": {name: [cost.peak, cost.seconds] for name, cost in plan.costs.parts().items()},
    }


def main(cases: list[str]) -> None:
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for case in cases:
        started = time.perf_counter()
        found[case] = run(case)
        found[case]["took"] = time.perf_counter() - started
        print(f"{case}: {found[case]['took']:.0f} s", flush=True)
        FOUND.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
