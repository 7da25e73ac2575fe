"""The stored results as a page: `python -m benchmarks.report` writes docs/benchmarks.md and its pictures from benchmarks/results/*.csv.

`python -m benchmarks.report FOLDER` does the same within a folder that holds CSV files, as benchmarks/gpu.sh leaves one.

Nothing stands there that is not in the CSV files, and they hold only what was measured.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row
from benchmarks.suite import OURS, geometric_mean
from trainers.charts import Series, picture

DOCS = Path(__file__).resolve().parents[1] / "docs"
SWEEP = "growing N"  # cases of this name are points of one curve
BEGIN, END = "<!-- written by `python -m benchmarks.report` -->", "<!-- end -->"


def main(folder: Path | None = None) -> None:
    """Write the page and the pictures, in docs/ from the stored results, or in a folder from the results that are in it."""
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text().split(BEGIN)
    if folder is not None:
        results.FOLDER = folder
    target = folder or DOCS
    sections = "\n\n".join(section for machine in results.machines() for section in machine_sections(machine, target))
    (target / page.name).write_text(f"{before}{BEGIN}\n\n{sections}\n\n{END}{rest.split(END)[1]}")


def machine_sections(machine: str, target: Path) -> Iterator[str]:
    """A heading, then for each op a summary, a table and its pictures."""
    rows = results.read(machine)
    yield f"## {machine}\n\nVersions: {', '.join(sorted({row['versions'] for row in rows}))}."
    for op, group in groupby(sorted(rows, key=lambda row: row["op"]), chapter):
        mine = list(group)
        yield f"### {op}, on {machine}\n\n{summary(mine)}\n\n{table(mine)}"
        yield from pictures(machine, op, [row for row in mine if row["case"].startswith(SWEEP)], target)


def chapter(row: Row) -> str:
    """The op; all training steps stand together."""
    return "Training steps" if row["op"].startswith("step") else row["op"]


def case_of(row: Row) -> tuple[str, ...]:
    return row["op"], row["case"], row["shape"], row["dtype"], row["mode"], row["versions"]


def by_case(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each case, fastest first, those that could not run last."""
    for _, group in groupby(sorted(rows, key=case_of), case_of):
        yield sorted(group, key=lambda row: float(row["median_ms"] or math.inf))


def best_baseline(rows: Iterable[Row]) -> float | None:
    """Milliseconds of the fastest provider of one case that is not ours."""
    return min(
        (float(r["median_ms"]) for r in rows if r["median_ms"] and not r["provider"].startswith(OURS)), default=None
    )


def summary(rows: list[Row]) -> str:
    """How our fastest backend stands to the fastest of all others, over the cases."""
    ratios = []
    for case in by_case(rows):
        ours = [float(r["median_ms"]) for r in case if r["median_ms"] and r["provider"].startswith(OURS)]
        best = best_baseline(case)
        if ours and best:
            ratios.append(best / min(ours))
    if not ratios:
        return "No case was measured with kdops and another provider."
    return (
        f"Against the fastest other provider of each case: {geometric_mean(ratios):.2f} times faster in geometric mean over "
        f"{len(ratios)} cases, from {min(ratios):.2f} to {max(ratios):.2f}."
    )


def table(rows: list[Row]) -> str:
    """One line for each case and provider."""
    lines = [
        "| case | provider | median, ms | spread, ms | host, ms | best other / this | share of floor | peak, MiB | tensors, MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in by_case(rows):
        lines += [_line(row, best_baseline(case)) for row in case]
    return "\n".join(lines)


def _line(row: Row, best: float | None) -> str:
    title = f"{row['case']}, {row['shape']}, {row['dtype']}, {row['mode']}"
    name = f"**{row['provider']}**" if row["provider"].startswith(OURS) else row["provider"]
    if row["refused"]:
        return f"| {title} | {name} | not measured: {row['refused']} | | | | | | | |"
    median = float(row["median_ms"])
    ratio = f"{best / median:.2f}" if best else ""
    share = f"{100 * float(row['floor_ms']) / median:.0f} %" if row["floor_ms"] else ""
    times = [row["median_ms"], row["spread_ms"], row["host_ms"]]
    figures = [*times, ratio, share, row["peak_mib"], row["tensors_mib"], row["error"]]
    return f"| {title} | {name} | {' | '.join(figures)} |"


def positions(row: Row) -> int:
    """N of the first tensor in a shape such as 1x48x256x256."""
    found = re.match(r"\d+x\d+((?:x\d+)+)", row["shape"])
    return math.prod(int(size) for size in found[1][1:].split("x")) if found else 0


def pictures(machine: str, op: str, rows: list[Row], target: Path) -> Iterator[str]:
    """Time and memory against N, with the floor as a line of its own."""
    for title, figure, unit, floor in (
        ("time", "median_ms", "ms", "floor_ms"),
        ("peak memory", "peak_mib", "MiB", "tensors_mib"),
    ):
        curves = _curves(rows, figure, floor)
        if not curves:
            continue
        file = target / "pictures" / f"{machine}-{op}-{title.replace(' ', '-')}.svg"
        file.parent.mkdir(exist_ok=True)
        heading = f"{op}: {title} of forward and backward against N"
        file.write_text(picture(heading, "N, positions", f"{title}, {unit}", curves))
        yield f"![{heading}](pictures/{file.name})"


def _curves(rows: list[Row], figure: str, floor: str) -> list[Series]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[figure] and float(row[figure]) > 0:
            found.setdefault(row["provider"], []).append((positions(row), float(row[figure])))
            if row["provider"].startswith(OURS):
                name = "floor" if floor == "floor_ms" else "inputs and results"
                found.setdefault(name, []).append((positions(row), float(row[floor])))
    names = sorted(found, key=lambda name: not name.startswith(OURS))
    return [Series(name, sorted(found[name]), i, i, markers=True) for i, name in enumerate(names)]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
