"""How sure a median is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % confidence interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the distance from low to high."""
        return (self.high - self.low) / 2


def interval_of(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of values with its percentile bootstrap interval, the same every time."""
    data = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[rows], axis=1), (2.5, 97.5))
    return Interval(float(np.median(data)), float(low), float(high))
