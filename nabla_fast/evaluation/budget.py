"""A budget for each problem, the same for every method: model calls, FLOPs or seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nabla_fast.stats import SequenceStats

COSTS = {"calls": "model_calls", "flops": "flops", "seconds": "seconds"}
"""What a budget may be of → what the cost is called in results."""

_FORM = "give calls=N, flops=X or seconds=S with a number above 0, such as calls=200"


@dataclass(frozen=True)
class Budget:
    """What a method may spend on a problem.

    A method begins another unit of its work (a sample, a rollout, a step of beam search, a simulation) while it has
    spent less, so that it goes beyond the budget by less than a unit.

    Attributes:
        kind: of `COSTS`. Calls and FLOPs are those of the report; seconds are those of the problem, of which a phase
            shared by several problems is divided equally among them.
        amount: how much, above 0.
    """

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that "calls=200" and the like name.

        Raises:
            ValueError: for anything else.
        """
        kind, _, number = (part.strip() for part in text.partition("="))
        if kind not in COSTS:
            raise ValueError(f"--budget is {text!r}, which names no cost; {_FORM}")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not (math.isfinite(amount) and amount > 0):
            raise ValueError(f"--budget is {text!r}; {_FORM}")
        return cls(kind, amount)

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.10g}"

    def spent(self, stats: SequenceStats, flops: float) -> float:
        """Of a record of counters and its estimated FLOPs, what counts."""
        if self.kind == "flops":
            return flops
        return stats.model_calls if self.kind == "calls" else sum(stats.seconds.values())

    def within(self, costs: list[float]) -> int:
        """How many units, one after the other, are begun with these costs."""
        spent, begun = 0.0, 0
        for cost in costs:
            if spent >= self.amount:
                break
            spent, begun = spent + cost, begun + 1
        return begun
