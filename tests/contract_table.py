"""Runs the contract tests and prints their result as a table, op x backend x clause: `make contract` keeps docs/contract.md current.

A cell is "yes" when every test of that clause passed, "FAILS" when one did not, "-" when the clause was not run there
(its reason stands below the table).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import tests.conftest  # isort: skip  (chooses Triton's interpreter, before kdops looks for it)  # noqa: F401
from kdops.dispatch import BACKENDS, SPECS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contract.md"
BEGIN, END = "<!-- table: written by `make contract` -->", "<!-- end of table -->"
CLAUSES = range(1, 16)


class Collector:
    """A pytest plugin that sorts outcomes by (op, backend, clause)."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        self.absent: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        if report.skipped and "test_backend_is_here" in report.nodeid:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            self.absent[report.nodeid.split("[")[1].split("-")[1]] = reason.split(": ", 2)[-1]
        found = re.search(r"test_(\d\d)_\w+\[(.*)\]", report.nodeid)
        for op in SPECS if found else ():
            for backend in BACKENDS:
                if found and f"{op}-{backend}-" in found[2]:
                    self.outcomes[op, backend, int(found[1])].add(report.outcome)

    def cell(self, op: str, backend: str, clause: int) -> str:
        seen = self.outcomes.get((op, backend, clause), set())
        if "failed" in seen:
            return "FAILS"
        return "yes" if "passed" in seen else "-"

    def table(self) -> str:
        lines = [
            "| op | backend | " + " | ".join(map(str, CLAUSES)) + " |",
            "| --- | --- |" + " --- |" * len(CLAUSES),
        ]
        for op, spec in sorted(SPECS.items()):
            for backend in spec.backends:
                cells = " | ".join(self.cell(op, backend.name, clause) for clause in CLAUSES)
                lines.append(f"| {op} | {backend.name} | {cells} |")
        lines += ["", *(f"- {backend} was not run: {reason}." for backend, reason in sorted(self.absent.items()))]
        return "\n".join(lines)


def main() -> int:
    collector = Collector()
    code = pytest.main(
        ["-q", "--no-header", "-p", "no:cacheprovider", "--slow", str(Path(__file__).with_name("test_contract.py"))],
        [collector],
    )
    table = collector.table()
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")
    sys.stdout.write(table + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
