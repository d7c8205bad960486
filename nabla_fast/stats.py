"""Counters and timings of a decode, per sequence and in total."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch.profiler import record_function

STEPS = {
    "rollout": "1 roll out",
    "selection": "2 select",
    "gradient": "gradient",
    "dto": "3 optimize",
    "resample": "4 resample",
    "reward": "5 reward",
}
"""Phase → what a profile calls it: the steps of `nabla_fast.decoder`, and what several of them need."""

PHASES = tuple(STEPS)
PASSES = ("rollout_calls", "drafted_tokens", "accepted_draft_tokens")


@dataclass(frozen=True)
class Revision:
    """A proposal: one token that DTO changed, with both rewards and the decision.

    Attributes:
        position: in the response, from 0.
        old_token, new_token: token ids.
        old_reward, new_reward: of the trajectories with either token.
        accepted: whether the new trajectory replaced the old one.
    """

    position: int
    old_token: int
    new_token: int
    old_reward: float
    new_reward: float
    accepted: bool


@dataclass
class SequenceStats:
    """Counters of one sequence.

    Attributes:
        rollouts: trajectories drawn, the first included.
        rejections: proposals whose reward was not higher.
        generated_tokens: tokens sampled in rollouts, whether kept or not.
        rollout_calls: forward passes of the language model for them, where it runs here; drafts make them fewer. Passes
            with rounded weights that make a draft are not counted.
        drafted_tokens, accepted_draft_tokens: draft tokens that those passes verified, and how many proved right.
        gradient_evaluations: forward and backward passes over both models.
        cache_hits, cache_misses: look-ups in the gradient cache.
        dto_iterations: optimization steps.
        reward_calls: trajectories and prefixes scored, those left out whose reward was known.
        prefix_rewards: how many of them were prefixes, for proposals that choose by their rewards.
        optimised_positions: positions at which DTO, or another proposal, looked for a token.
        skipped_positions: positions committed without that while rollouts were left.
        finish_reason: "stop" if the response ends with an end token, with a stop string or by a stopping criterion,
            "length" if it ends where it may be no longer, as vLLM says it; None of a sum, and before it has ended.
        seconds: wall-clock seconds per phase; a phase shared by several sequences is divided equally among them.
        revisions: every proposal, in order.
        optimised: positions of the answer at which a token was looked for, in order; empty in a sum.
    """

    rollouts: int = 0
    rejections: int = 0
    generated_tokens: int = 0
    rollout_calls: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0
    gradient_evaluations: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    dto_iterations: int = 0
    reward_calls: int = 0
    prefix_rewards: int = 0
    optimised_positions: int = 0
    skipped_positions: int = 0
    finish_reason: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    revisions: list[Revision] = field(default_factory=list)
    optimised: list[int] = field(default_factory=list)

    @property
    def model_calls(self) -> int:
        """The paper's count: one per generated token, four per gradient evaluation, one per reward call."""
        return self.generated_tokens + 4 * self.gradient_evaluations + self.reward_calls

    def counters(self) -> dict[str, int]:
        """The integer counters by name, `model_calls` included: the same alone and in a batch."""
        others = ("finish_reason", "seconds", "revisions", "optimised", *PASSES)
        counters = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return {**counters, "model_calls": self.model_calls}

    def add(self, other: SequenceStats) -> None:
        """Adds the counters and seconds of another record."""
        for name in (*other.counters(), *PASSES):
            if name != "model_calls":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        self.revisions.extend(other.revisions)

    def passes(self) -> dict[str, int]:
        """Forward passes and draft tokens of rollouts, by name; these depend on the batch."""
        return {name: getattr(self, name) for name in PASSES}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "model_calls": self.model_calls}


@dataclass
class Stats:
    """Counters of a call: one record per sequence, and their totals.

    Attributes:
        sequences: one record per prompt.
        cache: what `GradientCache.stats` said at the end, its evictions and bytes among it; empty without a cache.
        graphs: ``captures`` of gradients, rewards and rollouts as CUDA graphs in this call, ``capture_seconds`` and
            ``compile_seconds``; empty where neither was to be done. A later call with the same models captures what is
            new to it alone.
    """

    sequences: list[SequenceStats]
    cache: dict[str, int] = field(default_factory=dict)
    graphs: dict[str, float] = field(default_factory=dict)

    @property
    def totals(self) -> SequenceStats:
        """Sums over the sequences; `revisions` holds all of them."""
        total = SequenceStats()
        for record in self.sequences:
            total.add(record)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "sequences": [record.to_dict() for record in self.sequences],
            "totals": self.totals.to_dict(),
            "cache": dict(self.cache),
            "graphs": dict(self.graphs),
        }


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums of numbers by name; one that a part does not have counts nothing."""
    total: dict[str, float] = {}
    for part in parts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return total


class Clock:
    """Charges wall-clock time to phases, and names them in profiles; an inner phase's time is not the outer one's."""

    def __init__(self) -> None:
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str, records: Sequence[SequenceStats]) -> Iterator[None]:
        """Times a block and divides its own time equally among ``records``."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            with record_function(STEPS[name]):
                yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            for record in records:
                record.seconds[name] += own / len(records)
