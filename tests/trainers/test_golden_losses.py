"""The losses of every method and option are what they were."""

from __future__ import annotations

import json

import pytest

from tests.trainers.golden import CASES, FILE, losses
from trainers.methods import METHODS


@pytest.mark.parametrize("case", CASES)
def test_losses_are_what_they_were(case: str) -> None:
    stored = json.loads(FILE.read_text())[case]
    assert losses(case) == pytest.approx(stored, rel=1e-6, abs=1e-12)


def test_every_method_is_there() -> None:
    assert {name for name, _ in CASES.values()} == set(METHODS)
