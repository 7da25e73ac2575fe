"""Options of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.suite import CHOSEN


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store",
        nargs="?",
        const=results.FOLDER,
        type=Path,
        help="keep the rows in <machine>.csv in this folder (benchmarks/results); the contract of each op is run first",
    )
    parser.addoption("--device", choices=("cpu", "cuda"), help="only cases on this kind of device")
    parser.addoption(
        "--without", type=lambda text: text.split(","), default=[], help="leave providers out: max-autotune,eager"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before the suites are imported, which make their rows then."""
    CHOSEN.device = config.getoption("--device")
    CHOSEN.without = tuple(config.getoption("--without"))
    results.FOLDER = config.getoption("--store") or results.FOLDER


@pytest.fixture
def store(request: pytest.FixtureRequest) -> bool:
    """Whether rows are kept."""
    return request.config.getoption("--store") is not None
