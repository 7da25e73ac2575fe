"""The stored results: one CSV for each machine, one row for each op, provider, mode, shape and dtype. A rerun replaces its rows."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "results"

KEY = ("op", "provider", "mode", "case", "shape", "dtype", "machine", "versions")
FIGURES = (
    "median_ms",
    "spread_ms",
    "host_ms",
    "peak_mib",
    "tensors_mib",
    "bytes",
    "flops",
    "floor_ms",
    "error",
    "date",
    "refused",
)
FIELDS = (*KEY, *FIGURES)

Row = dict[str, str]


def path(machine: str) -> Path:
    """Where the rows of one machine are."""
    return FOLDER / f"{machine}.csv"


def read(machine: str) -> list[Row]:
    """The stored rows of one machine; none if it has no file yet."""
    if not path(machine).exists():
        return []
    with path(machine).open(newline="") as file:
        return list(csv.DictReader(file))


def machines() -> Iterator[str]:
    """Every machine that has results."""
    return (found.stem for found in sorted(FOLDER.glob("*.csv")))


def store(machine: str, rows: Iterable[Row]) -> None:
    """Add the rows, replacing those with the same key; the file is replaced whole, so that a killed run leaves the old one."""
    kept = {_key(row): row for row in [*read(machine), *rows]}
    FOLDER.mkdir(exist_ok=True)
    partial = path(machine).with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept))
    os.replace(partial, path(machine))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[field] for field in KEY)
