"""A speed is reported only of an op that is right: its contract must be green on the backend that is measured.

`python -m benchmarks.contract_gate 150 triton cuda` runs the contract of every op on these backends, on all cores and for 150 s at most,
and keeps what it said for the benchmarks that follow: what is not done by then counts as red. Run again, it tries the red ones again.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import kdops  # noqa: F401  (registers the ops)
from kdops.dispatch import SPECS

ROOT = Path(__file__).resolve().parents[1]
STAMPS = ROOT / "build" / "contract"  # ignored by git: why it is red, or nothing, for these very sources
TESTS = [str(ROOT / "tests" / "test_contract.py")]
OURS = "kdops."
SHOWN = 10_000  # characters of what failed
RESULT = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED)")
TEST = re.compile(r"::(.+?\])(?: |$)")

Pair = tuple[str, str]  # an op and a backend


def refusal(op: str, provider: str, store: bool) -> str | None:
    """Why a row of this provider may not be stored: the contract of this op and backend fails. None for others' code."""
    if not store or not provider.startswith(OURS):
        return None
    return _red(op, provider.removeprefix(OURS))


@cache
def _red(op: str, backend: str) -> str | None:
    """Why it is red: what an earlier run of the same sources found, else what a run finds."""
    pair = (op, backend)
    if not _stamp(pair).exists():
        _run([pair], None)
    return _stamp(pair).read_text() or None


def _stamp(pair: Pair) -> Path:
    return STAMPS / f"{'-'.join(pair)}-{_sources(pair[0])}"


def _run(pairs: Sequence[Pair], seconds: float | None, processes: int = 1) -> None:
    """Runs the contract of these pairs, for so many seconds at most, and writes of each why it is red, or nothing."""
    names = {pair: f"{'-'.join(pair)}-" for pair in pairs}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-k", " or ".join(names.values())]
    shared = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and find_spec("xdist") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env=environment)
    reason, unfinished = "", list[str]()
    try:
        done = run([*command, "-v", *shared], timeout=seconds)
        said = done.stdout
        if done.returncode not in (0, 1):  # no test ran, or pytest itself failed
            reason = f"its contract did not run: {(done.stderr.strip() or said.strip())[-200:]}"
            unfinished = list(names.values())
    except subprocess.TimeoutExpired as error:
        said, reason = (error.stdout or b"").decode(), "its contract was not done in time"
        unfinished = _tests(run([*command, "--collect-only", "-q"]).stdout.splitlines())
    results = [line for line in said.splitlines() if RESULT.search(line)]
    ran, failures = set(_tests(results)), _tests(line for line in results if re.search("FAILED|ERROR", line))
    STAMPS.mkdir(parents=True, exist_ok=True)
    for pair, name in names.items():
        failed = [test for test in failures if name in test]
        red = reason if any(name in test for test in unfinished if test not in ran) else ""
        if failed:
            red = f"its contract is red: {'; '.join(failed[:2])}; {len(failed)} failed"
        _stamp(pair).write_text(red)
    (STAMPS / "log.txt").write_text(said)
    failure = said.find("= FAILURES =")
    if failure >= 0:
        print(said[failure:][:SHOWN], file=sys.stderr, flush=True)


def _tests(lines: Iterable[str]) -> list[str]:
    """The names of the tests that the lines are about, each once."""
    found = (TEST.search(line) for line in lines)
    return list(dict.fromkeys(match[1] for match in found if match))


@cache
def _sources(op: str) -> str:
    """A digest of all that the contract of an op depends on: its own files and what all ops share."""
    flat = SPECS[op].function.__module__.split(".")[1] if op in SPECS else op
    digest = hashlib.sha256()
    for pattern in ("kdops/*.py", f"kdops/{flat}/*.py", "csrc/common/*", f"csrc/{flat}*", "tests/*contract*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(seconds: float, backends: Sequence[str]) -> int:
    """Run what is not known to be green; say green or red of each pair of op and backend. 1 when any is red."""
    pairs = [(op, b.name) for op, spec in SPECS.items() for b in spec.backends if b.name in backends]
    unknown = [pair for pair in pairs if not _stamp(pair).exists() or _stamp(pair).read_text()]
    if unknown:
        _run(unknown, seconds, min(14, os.cpu_count() or 1))
    for pair in pairs:
        print(f"{pair[0]} on {pair[1]}: {_stamp(pair).read_text() or 'green'}", flush=True)
    return int(any(_stamp(pair).read_text() for pair in pairs))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
