"""Options of the benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store",
        action="store_true",
        help="keep the rows in benchmarks/results/<machine>.csv; the contract of each op is run first",
    )


@pytest.fixture
def store(request: pytest.FixtureRequest) -> bool:
    """Whether rows are kept."""
    return bool(request.config.getoption("--store"))
