"""Paired statistics over seeds: what one method gains over another when both had the same initial weights and the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

from trainers.results import deviation, difference

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The differences of two arms, seed by seed."""

    differences: dict[int, float]
    """Seed -> difference in dB; at least one."""

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return mean(self.differences.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one, NaN with an infinite difference."""
        return deviation(self.differences.values()) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """mean +- t s / sqrt(n), t of n - 1 degrees of freedom: the 95 % interval of the mean; None for a single seed."""
        if self.deviation is None:
            return None
        half = t_quantile(self.n - 1) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def agree(self) -> int:
        """How many seeds have a difference of the sign of the mean."""
        return sum(difference * self.mean > 0 for difference in self.differences.values())

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 0 out; never for a single seed."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {"n": self.n, "mean": self.mean, "deviation": self.deviation, "interval": self.interval}
        return {**numbers, "agree": self.agree, "settled": self.settled, "differences": self.differences}


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Paired | None:
    """Of two seed -> dB; None without a seed that both have."""
    common = {seed: difference(ours[seed], theirs[seed]) for seed in ours if seed in theirs}
    return Paired(common) if common else None


def t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = CONFIDENCE for Student's distribution with `freedom` degrees of freedom, by bisection."""
    low, high = 0.0, 1000.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t): the finite series of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
