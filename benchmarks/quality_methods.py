"""The methods of `quality.py`: those of the evaluation, nothing decoded twice, and two of its own.

Samples for a smaller n are among those for a larger one, and an answer that left rollouts over is the answer for every
larger ``max_rollouts`` too. Counters and seconds are those of the decode that an answer comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch

from nabla_fast.baselines import Samples
from nabla_fast.evaluation import methods
from nabla_fast.evaluation.methods import NABLA, Answer, Batch
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

SAMPLES = (1, 2, 4, 8, 16, 32)
BLIND, FRESH = "blind-resampling", "nabla-fresh-noise"
Method = Callable[[Batch], list[Answer]]


@dataclass(frozen=True)
class FreshNoise(Sampler):
    """Resamples a position with other noise than the rollout was drawn with."""

    resample: Any = None

    def __call__(
        self, logits: torch.Tensor, sampling: Any, sequences: Seq[Sequence], responses: Seq[tuple[int, ...]]
    ) -> torch.Tensor:
        """See `Sampler.__call__`."""
        if sampling is self.resample:
            sequences = [replace(sequence, seed=sequence.seed ^ 0x5DEECE66D) for sequence in sequences]
        return super().__call__(logits, sampling, sequences, responses)


def fresh(batch: Batch) -> list[Answer]:
    """∇-Reasoner whose resampling has noise of its own."""
    return methods.nabla(batch, FreshNoise(resample=batch.config.resample))


def blind(batch: Batch) -> list[Answer]:
    """The same positions resampled without any optimization."""
    return fresh(replace(batch, config=batch.config.replace(max_iters=0)))


def thrifty() -> dict[str, Method]:
    """Every method, with memories of their own: for one pair of models and one task."""
    drawn: dict[Any, Samples] = {}

    def groups(batch: Batch) -> list[Samples]:
        keys = [(batch.config, *key) for key in zip(batch.seeds, batch.prompt_ids, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in drawn]
        if missing:
            some = replace(_only(batch, missing), n=max(SAMPLES))
            drawn.update(zip([keys[i] for i in missing], methods.draw(some, batch.config, scored=True), strict=True))
        return [drawn[key].first(batch.n) for key in keys]

    return {
        "greedy": methods.greedy,
        "best-of-n": lambda batch: methods.best_of_n(batch, groups(batch)),
        "self-consistency": lambda batch: methods.self_consistency(batch, [_unscored(g) for g in groups(batch)]),
        NABLA: _once(methods.nabla),
        FRESH: _once(fresh),
        BLIND: _once(blind),
    }


def _once(method: Method) -> Method:
    """``method`` without the decodes that a smaller n has made already."""
    kept: dict[Any, tuple[int, Answer]] = {}

    def run(batch: Batch) -> list[Answer]:
        keys = [(batch.config, *key) for key in zip(batch.seeds, batch.prompt_ids, strict=True)]

        def known(key: Any) -> bool:
            n, answer = kept.get(key, (0, None))
            return answer is not None and (n == batch.n or (answer.stats.rollouts < n < batch.n))

        missing = [i for i, key in enumerate(keys) if not known(key)]
        if missing:
            for i, answer in zip(missing, method(_only(batch, missing)), strict=True):
                kept[keys[i]] = batch.n, answer
        return [kept[key][1] for key in keys]

    return run


def _only(batch: Batch, rows: Seq[int]) -> Batch:
    """Some problems of a batch."""
    names = ("problems", "prompt_ids", "frames", "seeds")
    return replace(batch, **{name: [getattr(batch, name)[i] for i in rows] for name in names})


def _unscored(group: Samples) -> Samples:
    """What drawing alone would have taken."""
    records = [replace(r, reward_calls=0, seconds={**r.seconds, "reward": 0.0}) for r in group.records]
    return Samples(group.sequences, None, records)
