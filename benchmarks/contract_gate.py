"""A speed is reported only of an op that is right: its contract must be green on the backend that is measured.

`python -m benchmarks.contract_gate 150 triton cuda` runs the contract of every op on these backends, several at once and for 150 s at most,
and keeps what it said for the benchmarks that follow: what is not done by then counts as red. Run again, it tries the red ones again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMPS = ROOT / "build" / "contract"  # ignored by git: why it is red, or nothing, for these very sources
TESTS = [str(ROOT / "tests" / "test_contract.py")]
OURS = "kdops."


def refusal(op: str, provider: str, store: bool) -> str | None:
    """Why a row of this provider may not be stored: the contract of this op and backend fails. None for others' code."""
    if not store or not provider.startswith(OURS):
        return None
    return _red(op, provider.removeprefix(OURS))


@cache
def _red(op: str, backend: str) -> str | None:
    """Why it is red: what an earlier run of the same sources found, else what a run finds."""
    stamp = STAMPS / f"{op}-{backend}-{_sources()}"
    if not stamp.exists():
        _run(op, backend, stamp, None)
    return stamp.read_text() or None


def _run(op: str, backend: str, stamp: Path, seconds: float | None) -> None:
    """Runs the contract, for so many seconds at most, and writes why it is red."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", f"{op}-{backend}-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        reason = "its contract was not done in time"
    else:
        lines = run.stdout.splitlines()
        said = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:2] + lines[-1:]
        reason = f"its contract is red: {'; '.join(said) or run.stderr.strip()[-200:]}" if run.returncode else ""
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(reason)


@cache
def _sources() -> str:
    """A digest of all that the contract depends on."""
    digest = hashlib.sha256()
    for folder, pattern in (("kdops", "**/*.py"), ("csrc", "**/*.*"), ("tests", "*contract*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(seconds: float, backends: Sequence[str]) -> int:
    """Run what is not known to be green; say green or red of each pair of op and backend. 1 when any is red."""
    from kdops.dispatch import SPECS

    deadline = time.monotonic() + seconds
    pairs = [(op, b.name) for op, spec in SPECS.items() for b in spec.backends if b.name in backends]

    def check(pair: tuple[str, str]) -> str:
        stamp = STAMPS / f"{pair[0]}-{pair[1]}-{_sources()}"
        if not stamp.exists() or stamp.read_text():
            _run(*pair, stamp, max(0.1, deadline - time.monotonic()))
        said = f"{pair[0]} on {pair[1]}: {stamp.read_text() or 'green'}"
        print(said, flush=True)
        return said

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        return int(not all(said.endswith(": green") for said in pool.map(check, pairs)))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
