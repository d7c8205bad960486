"""Bootstrap intervals over problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval (`LEVEL`)."""

    mean: float
    low: float
    high: float


def with_interval(measure: Mapping[str, float] | None, scale: float = 100, form: str = "+.1f", unit: str = "") -> str:
    """A mean and its interval, such as a difference of shares in percentage points; "-" where there is none."""
    if measure is None:
        return "-"
    mean, low, high = (format(scale * measure[part], form) for part in ("mean", "low", "high"))
    return f"{mean}{unit} ({low} to {high})"


def interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of P values, one a problem, and the interval that it has when problems are drawn anew.

    Equal arguments give equal intervals.

    Raises:
        ValueError: if there are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("values is empty; a bootstrap needs at least one problem")
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    # In parts, because resamples times problems can be more than memory should hold.
    rows = max(1, _AT_ONCE // len(data))
    for first in range(0, resamples, rows):
        drawn = generator.integers(len(data), size=(min(rows, resamples - first), len(data)))
        means.append(data[drawn].mean(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    mean = float(data.mean())
    # Rounding must not put the mean of equal values outside its interval.
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of ``ours - theirs`` (P each, problem by problem) and its interval.

    Raises:
        ValueError: if there are no values, or not equally many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ours has {len(ours)} values and theirs {len(theirs)}; a pair is of one problem")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], seed=seed)
