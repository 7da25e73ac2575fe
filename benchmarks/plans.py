"""What `kdtrain plan` says of every method, written to docs/plan.md. `python -m benchmarks.plans [CASE ...]`

Runs the cases named (all without a name) of benchmarks/plans.yaml, keeps what they gave in benchmarks/plans.json, and writes the page from
it. A step that would take longer than LONGEST seconds is simulated. Nothing else should run: `chrt -f 10` keeps other work away.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.config import Config, contradictions
from trainers.config_file import load_config
from trainers.methods import METHODS
from trainers.plan import BACKENDS, Planner, Point

INTRODUCTION = """# Plans of every method

What `kdtrain plan` says of a training step of each method at patches of 128, 256 and 512 pixels, with the kdops and with the
reference backend, written by

```sh
chrt -f 10 python -m benchmarks.plans
```

from `benchmarks/plans.yaml`: a Restormer of 8 channels learns denoising from one of 16 (`releases/restormer-denoise25.safetensors`), with
all its taps, two of which have full resolution; `dukd`, which needs super-resolution, has the demo's EDSR. The machine has 2 cores of an
AMD EPYC with AVX-512, torch 2.13; 27 November 2026, 14 minutes in all. The limits are 4 GiB and 60 s a step.

*Measured*: the step was run, in a process of its own. MiB are the most that this process held, torch itself included, and ms those of
a step; above 3 s it was run once, and a first run is slower. *Simulated*: beyond the limits, counted on fake tensors, with what two small
measured steps tell of the process and of the time that each part takes for its work. Methods without an op of ours do the same
on both backends and were run once.

## Full resolution in 4 GiB

With SKD at patch 256, 65,536 positions attend to 65,536 others, at two taps. The same step in training,

```sh
kdtrain train benchmarks/plans.yaml --set train.steps=2 --set data.batch=1 --set data.patch=256 --set train.log_every=1
```

took 16.4 s (the second; the first also measures the gradients' shares, in 34.6 s), and the process held at most 1.27 GiB until its
last validation, which restores whole photographs, and 1.42 GiB at its end; the last line of `kdtrain plan` is about that, and
`val.tile` makes it smaller.
On the reference `kdtrain plan` refuses the step with its number, in the tables below. A slow test in `tests/trainers/test_plan.py`
holds the planned step below 4 GiB, its prediction within 10 %, and the refusal.
"""
PREDICTED = """
## How right the predictions are

Memory and time of measured steps as they are predicted without running them; steps from which the predictions were learned are left
out. Memory is within 10.5 %. Times are further off, and those of steps of more than 3 s most: they were run once, and a first run takes
fresh memory from the system, which small steps do not show.
"""
PARTS = """
## By network and loss term

Bytes of a part are the most that it holds at once, so parts do not add up to the process; the times do, but for the optimiser.
"""

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
    "student={arch: nafnet, width: 8, encoder_blocks: [1, 1, 1], middle_blocks: 1, decoder_blocks: [1, 1, 1]}",
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
    for patch in (*PATCHES, *([1024] if case == "skd" else [])):
        assert not contradictions(planner.config)
        found[str(patch)] = {backend: _plan(planner, patch, backend) for backend in BACKENDS}
    return {"batch": planner.config.data.batch, "student": planner.config.student.arch, "patches": found}


def _plan(planner: Planner, patch: int, backend: str) -> dict[str, Any]:
    point = Point(patch, planner.config.data.batch, False, backend)
    predicted, learned = planner.predict(point), planner.learned_from(point)
    plan = planner.plan(point)
    return {
        "measured": plan.measured,
        "peak": plan.peak,
        "seconds": plan.seconds,
        "predicted": {
            "peak": predicted.peak,
            "seconds": predicted.seconds,
            "learned from": learned,
        },
        "parts": {name: [cost.peak, cost.seconds] for name, cost in plan.costs.parts().items()},
    }


# --- the page ------------------------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """docs/plan.md."""
    known = [case for case in CASES if case in found]
    return "\n".join(
        [
            INTRODUCTION,
            *_summary([case for case in known if "," not in case], found),
            PREDICTED,
            *_accuracy(known, found),
            PARTS,
            *(line for case in known for line in _parts(case, found[case])),
        ]
    )


def _cell(size: float, seconds: float) -> str:
    return f"{size / MIB:,.0f} / {1e3 * seconds:,.0f}"


def _how(plan: dict[str, Any]) -> str:
    return "measured" if plan["measured"] else "simulated"


def _columns(case: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(patch, backend, plan) for patch, plans in case["patches"].items() for backend, plan in plans.items()]


def _summary(cases: list[str], found: dict[str, Any]) -> Iterator[str]:
    for patch in map(str, PATCHES):
        yield f"\n**Patch {patch}**\n"
        yield "| method | batch | kdops, MiB / ms | | reference, MiB / ms | | most is taken by, on the reference |"
        yield "| --- | --- | ---: | --- | ---: | --- | --- |"
        for case in cases:
            plans = found[case]["patches"][patch]
            cells = [text for plan in plans.values() for text in (_cell(plan["peak"], plan["seconds"]), _how(plan))]
            name, (size, _) = max(plans["reference"]["parts"].items(), key=lambda part: part[1][0])
            yield f"| `{case}` | {found[case]['batch']} | {' | '.join(cells)} | {name}, {size / MIB:,.0f} MiB |"


def _accuracy(cases: list[str], found: dict[str, Any]) -> Iterator[str]:
    yield "| case | student | patch | backend | peak measured, MiB | predicted | off | step measured, ms | predicted | off |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for case in cases:
        for patch, backend, plan in _columns(found[case]):
            learned = plan["predicted"]["learned from"]
            twin = backend == "reference" and plan == found[case]["patches"][patch]["kdops"]
            if plan["measured"] and learned is False and not twin:
                cells = [f"{case} | {found[case]['student']} | {patch} | {backend}"]
                for key, unit in (("peak", 1 / MIB), ("seconds", 1e3)):
                    seen, said = plan[key] * unit, plan["predicted"][key] * unit
                    cells.append(f"{seen:,.0f} | {said:,.0f} | {said / seen - 1:+.1%}")
                yield f"| {' | '.join(cells)} |"


def _parts(name: str, case: dict[str, Any]) -> Iterator[str]:
    columns = _columns(case)
    yield f"\n### {name}\n"
    yield f"{case['student']}, batch of {case['batch']}; MiB / ms of each part.\n"
    yield f"| part | {' | '.join(f'{patch} {backend}, {_how(plan)}' for patch, backend, plan in columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for part in columns[0][2]["parts"]:
        yield f"| {part} | {' | '.join(_cell(*plan['parts'][part]) for *_, plan in columns)} |"
    yield f"| process, step | {' | '.join(_cell(plan['peak'], plan['seconds']) for *_, plan in columns)} |"


def main(cases: list[str]) -> None:
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for case in cases:
        started = time.perf_counter()
        found[case] = run(case)
        found[case]["took"] = time.perf_counter() - started
        print(f"{case}: {found[case]['took']:.0f} s", flush=True)
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
