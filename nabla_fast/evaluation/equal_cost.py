"""A method against another one at equal cost, which no n of the other need have exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nabla_fast.evaluation.bootstrap import Interval, paired_difference


@dataclass(frozen=True)
class Point:
    """A method at one n.

    Attributes:
        cost: mean per problem, above 0.
        accuracy: problem id → share of right answers.
    """

    cost: float
    accuracy: Mapping[str, float]


def difference(ours: Point, curve: Sequence[Point]) -> Interval | None:
    """Accuracy of ``ours`` minus that of ``curve`` at the cost of ``ours``, with a paired bootstrap interval.

    The curve is interpolated linearly in the logarithm of the cost between its neighbouring points, for each problem.

    Returns:
        None where the cost lies outside the curve (nothing is extrapolated), or no problem is common to the points.
    """
    points = sorted(curve, key=lambda point: point.cost)
    for low, high in itertools.pairwise(points):
        if low.cost <= ours.cost <= high.cost:
            share = _share(ours.cost, low.cost, high.cost)
            both = [p for p in ours.accuracy if p in low.accuracy and p in high.accuracy]
            if not both:
                return None
            theirs = [(1 - share) * low.accuracy[p] + share * high.accuracy[p] for p in both]
            return paired_difference([ours.accuracy[p] for p in both], theirs)
    return None


def _share(cost: float, low: float, high: float) -> float:
    return 0.0 if low == high else math.log(cost / low) / math.log(high / low)
