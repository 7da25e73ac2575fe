"""A speed is reported only of an op that is right: its contract must be green on the backend that is measured."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMPS = ROOT / "build" / "contract"  # ignored by git: what was green, for these very sources
TESTS = [str(ROOT / "tests" / "test_contract.py")]
OURS = "kdops."


def refusal(op: str, provider: str, store: bool) -> str | None:
    """Why a row of this provider may not be stored: the contract of this op and backend fails. None for others' code."""
    if not store or not provider.startswith(OURS):
        return None
    return _red(op, provider.removeprefix(OURS))


@cache
def _red(op: str, backend: str) -> str | None:
    stamp = STAMPS / f"{op}-{backend}-{_sources()}"
    if stamp.exists():
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", f"{op}-{backend}-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        return f"its contract is red: {run.stdout.strip().splitlines()[-1]}"
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return None


@cache
def _sources() -> str:
    """A digest of all that the contract depends on."""
    digest = hashlib.sha256()
    for folder, pattern in (("kdops", "**/*.py"), ("csrc", "**/*.*"), ("tests", "*contract*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
