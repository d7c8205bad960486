"""Decoding methods as the evaluation runs them: problems in, answers with their counters out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nabla_fast import baselines
from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.evaluation.flops import Sizes, Work, estimate, sizes
from nabla_fast.evaluation.grading import Grader
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.generate import Pair, make_pair, run, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.sampling import Sampler
from nabla_fast.stats import SequenceStats

MAX_ROLLOUTS = "nabla"
"""The method whose n is `NablaConfig.max_rollouts`; to the others that have one it is the number of samples."""


@dataclass(frozen=True)
class Models:
    """A pair of models, how large they are, and the further arguments of their chat templates."""

    pair: Pair
    sizes: Sizes
    template_kwargs: Mapping[str, Any] | None = None

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The language model's prompt."""
        return tuple(generation_prompt_ids(self.pair.tokenizer, problem.chat, self.template_kwargs))


@dataclass(frozen=True)
class Answer:
    """What a method makes of a problem.

    Attributes:
        text: the response.
        tokens: its length.
        reward: of the response; None where the method scores nothing.
        reward_before: of the first response drawn.
        stats: counters and seconds.
        flops: estimated, see `nabla_fast.evaluation.flops`.
    """

    text: str
    tokens: int
    reward: float | None
    reward_before: float | None
    stats: SequenceStats
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a line of the results."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "reward": self.reward,
            "reward_before": self.reward_before,
            **self.stats.counters(),
            "flops": self.flops,
            "seconds": sum(self.stats.seconds.values()),
            "phases": dict(self.stats.seconds),
        }


@dataclass(frozen=True)
class Batch:
    """Problems, with distinct prompts, that are decoded together.

    Attributes:
        models: decode them.
        problems: B of them.
        prompt_ids: (B) of the language model.
        frames: (B) of the reward model.
        seeds: (B) of their noise.
        grader: says which answers are the same.
        config: settings.
        n: see `MAX_ROLLOUTS`.
        size: most sequences to decode together.
    """

    models: Models
    problems: Sequence[Problem]
    prompt_ids: Sequence[tuple[int, ...]]
    frames: Sequence[RewardFrame]
    seeds: Sequence[int]
    grader: Grader
    config: NablaConfig
    n: int
    size: int


def load(
    model: Any, tokenizer: Any, reward_model: Any, reward_tokenizer: Any, config: NablaConfig | None = None
) -> Models:
    """Makes two models ready for an evaluation. Arguments and errors as in `nabla_fast.generate`."""
    config = config or NablaConfig()
    pair = make_pair(model, tokenizer, reward_model, reward_tokenizer, config)
    return Models(pair, sizes(pair), config.chat_template_kwargs)


def make_batch(
    models: Models,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    grader: Grader,
    config: NablaConfig,
    n: int,
    size: int,
) -> Batch:
    """Prepares problems for a method."""
    ids, frames = models.pair.prompts([problem.chat for problem in problems], config)
    return Batch(models, problems, ids, frames, seeds, grader, config, n, size)


def greedy(batch: Batch) -> list[Answer]:
    """Greedy decoding, scored once."""
    return best_of_n(batch, draw(batch, batch.config.replace(rollout=Sampling(temperature=0.0)), scored=True))


def best_of_n(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The best of n samples by reward; ``groups`` holds the samples of each problem where they are drawn already."""
    groups = draw(batch, batch.config, scored=True) if groups is None else groups
    return _chosen(batch, groups, [baselines.best(group) for group in groups])


def self_consistency(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The majority of n samples; nothing is scored. ``groups`` as in `best_of_n`."""
    groups = draw(batch, batch.config, scored=False) if groups is None else groups
    found = []
    for problem, group in zip(batch.problems, groups, strict=True):
        answers = [batch.grader.answer(problem.id, text) for text in group.texts]
        found.append(baselines.vote(answers, batch.grader.same))
    return _chosen(batch, groups, found)


def nabla(batch: Batch, sampler: Sampler | None = None) -> list[Answer]:
    """∇-Reasoner with n rollouts at most: `nabla_fast.generate`, its models made ready once."""
    config = batch.config.replace(max_rollouts=batch.n)
    pair = batch.models.pair
    out = run(pair, batch.prompt_ids, batch.frames, config, stop_rule(pair, config), sampler, seeds=batch.seeds)
    return [
        _answer(
            batch,
            i,
            text=out.texts[i],
            tokens=len(out.sequences[i]),
            rewards=(stats.revisions[0].old_reward if stats.revisions else out.rewards[i], out.rewards[i]),
            stats=stats,
            conversations=1,
        )
        for i, stats in enumerate(out.stats.sequences)
    ]


METHODS: dict[str, Callable[[Batch], list[Answer]]] = {
    "greedy": greedy,
    "self-consistency": self_consistency,
    "best-of-n": best_of_n,
    MAX_ROLLOUTS: nabla,
}


def draw(batch: Batch, config: NablaConfig, *, scored: bool) -> list[baselines.Samples]:
    """n samples of each problem."""
    return baselines.sample(
        batch.models.pair,
        batch.prompt_ids,
        batch.frames,
        batch.n,
        config,
        scored=scored,
        seeds=batch.seeds,
        batch_size=batch.size,
    )


def _chosen(batch: Batch, groups: Sequence[baselines.Samples], indices: Sequence[int]) -> list[Answer]:
    answers = []
    for i, (group, chosen) in enumerate(zip(groups, indices, strict=True)):
        stats = group.stats
        answers.append(
            _answer(
                batch,
                i,
                text=group.texts[chosen],
                tokens=len(group.sequences[chosen]),
                rewards=None if group.rewards is None else (group.rewards[0], group.rewards[chosen]),
                stats=stats,
                conversations=stats.reward_calls,
            )
        )
    return answers


def _answer(
    batch: Batch,
    i: int,
    *,
    text: str,
    tokens: int,
    rewards: tuple[float, float] | None,
    stats: SequenceStats,
    conversations: int,
) -> Answer:
    frame = (len(batch.frames[i].opening), len(batch.frames[i].closing))
    work = Work(stats, len(batch.prompt_ids[i]), frame, tokens, conversations)
    flops = estimate(batch.models.sizes, work, batch.config)
    before, after = rewards or (None, None)
    return Answer(text, tokens, after, before, stats, flops)
