"""Has anything become slower? `python -m benchmarks.check` measures ratios again and compares them with the stored ones.

For every stored CPU case of this kind of machine: how many times kdops is faster than the fastest baseline, both in one process,
interleaved. A machine's mood changes times and hardly ratios, so a ratio that fell below `TOLERANCE` of the stored one, in each of
`TRIES` tries, is reported, and the exit status is 1.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import machine, results
from benchmarks.report import by_case
from benchmarks.results import Row
from benchmarks.suite import OURS, Case, Suite

TOLERANCE = 0.75
TRIES = 3
LONGEST = 500.0  # milliseconds: slower cases would make the check take minutes


def suites() -> Iterator[Suite]:
    """Every suite of the benchmarks in this folder."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for value in list(vars(module).values()):  # a warning in what is measured adds a name to its module
            found = value.values() if isinstance(value, dict) else [value]
            yield from (suite for suite in found if isinstance(suite, Suite))


def stored_rivals(rows: list[Row]) -> tuple[float, str] | None:
    """The stored ratio of one case, and the baseline that it is to; None where either is missing or slow."""
    ours = next((r for r in rows if r["provider"] == OURS + "cpu" and r["median_ms"]), None)
    rival = next((r for r in rows if not r["provider"].startswith(OURS) and r["median_ms"]), None)  # fastest first
    if ours is None or rival is None or float(rival["median_ms"]) > LONGEST:
        return None
    return float(rival["median_ms"]) / float(ours["median_ms"]), rival["provider"]


def ratio(suite: Suite, case: Case, rival: str) -> float:
    """Measured now."""
    times = suite.compare(case, [OURS + "cpu", rival])
    return times[rival].median / times[OURS + "cpu"].median


def main() -> int:
    """Print each ratio beside the stored one; 1 when one fell."""
    rows = [row for row in results.read(machine.name("cpu")) if row["versions"] == machine.versions()]
    if not rows:
        print(
            f"No results of this machine ({machine.name('cpu')}, {machine.versions()}): run pytest benchmarks --store first."
        )
        return 1
    stored = {(group[0]["op"], group[0]["case"], group[0]["shape"]): group for group in by_case(rows)}
    fallen = 0
    for suite in suites():
        for case in suite.cases:
            found = stored_rivals(stored.get((suite.spec.name, case.name, case.shape), []))
            if found is None:
                continue
            before, rival = found
            now = 0.0
            for _ in range(TRIES):
                now = max(now, ratio(suite, case, rival))
                if now >= TOLERANCE * before:
                    break
            verdict = "ok" if now >= TOLERANCE * before else "SLOWER"
            fallen += verdict == "SLOWER"
            print(f"{verdict:6} {suite.spec.name}, {case}: {now:.2f} times {rival}, stored {before:.2f}", flush=True)
    return int(fallen > 0)


if __name__ == "__main__":
    sys.exit(main())
