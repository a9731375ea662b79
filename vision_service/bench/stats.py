"""Many measurements as a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure, measured in several rounds.

    Attributes:
        median: of the rounds.
        low: the smallest.
        high: the largest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies, milliseconds: half of the calls took at most ``p50``."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, latencies_s: Sequence[float]) -> Percentiles | None:
        """Of seconds; ``None`` when there are none."""
        if not latencies_s:
            return None
        # The smallest value that so many did not exceed: a measured one, never one between two.
        p50, p95, p99 = 1000 * np.percentile(latencies_s, (50, 95, 99), method="inverted_cdf")
        return cls(float(p50), float(p95), float(p99))


def histogram(values: Iterable[int]) -> dict[int, int]:
    """How often each value comes, smallest value first."""
    return dict(sorted(Counter(values).items()))
