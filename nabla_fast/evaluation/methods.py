"""Decoding methods as the evaluation runs them: problems in, answers with their counters out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from nabla_fast import baselines
from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.decoder import Sequence as Response
from nabla_fast.evaluation.flops import Sizes, Work, estimate, sizes
from nabla_fast.evaluation.grading import Grader
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.evaluation.thoughts import spoken
from nabla_fast.generate import Pair, make_pair, run, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.sampling import Sampler
from nabla_fast.stats import SequenceStats

NABLA = "nabla"
PROPOSALS = {
    NABLA: None,
    "likeliest": "likeliest",
    "first-order": "first_order",
    "prefix-reward": "prefix_reward",
    "guided": "guided",
}
"""Method of the decode loop → its `NablaConfig.proposal`; None takes the one that is configured."""

ONE_N = ("greedy", "guided")
"""Methods that draw one response, so that they have one n."""

MAX_ROLLOUTS = tuple(method for method in PROPOSALS if method not in ONE_N)
"""Methods whose n is `NablaConfig.max_rollouts`; to the others that have one it is the number of samples."""


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
        spoken: the response without its thoughts, which is what is graded.
        tokens: its length.
        reward: of the response; None where the method scores nothing.
        reward_before: of the first response drawn.
        stats: counters and seconds of all samples, and why this one ended.
        flops: estimated, see `nabla_fast.evaluation.flops`.
    """

    text: str
    tokens: int
    reward: float | None
    reward_before: float | None
    stats: SequenceStats
    flops: float
    spoken: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a line of the results."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "reward": self.reward,
            "reward_before": self.reward_before,
            "finish_reason": self.stats.finish_reason,
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
        n: see `MAX_ROLLOUTS`; what has one n does not look at it.
        size: most sequences to decode together.
        on_answer: hears of a problem, by its index, and its answer while others are under way.
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
    on_answer: Callable[[int, Answer], None] = lambda *_: None


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
    on_answer: Callable[[int, Answer], None] = lambda *_: None,
) -> Batch:
    """Prepares problems for a method."""
    ids, frames = models.pair.prompts([problem.chat for problem in problems], config)
    return Batch(models, problems, ids, frames, seeds, grader, config, n, size, on_answer)


def greedy(batch: Batch) -> list[Answer]:
    """Greedy decoding, scored once."""
    config = batch.config.replace(rollout=Sampling(temperature=0.0))
    return _of_samples(batch, None, config, lambda _, group: baselines.best(group), scored=True)


def best_of_n(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The best of n samples by reward; ``groups`` holds the samples of each problem where they are drawn already."""
    return _of_samples(batch, groups, batch.config, lambda _, group: baselines.best(group), scored=True)


def self_consistency(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The majority of n samples; nothing is scored. ``groups`` as in `best_of_n`."""

    def vote(i: int, group: baselines.Samples) -> int:
        spoken = [_spoken(batch, i, tokens) for tokens in group.sequences]
        return baselines.vote([batch.grader.answer(batch.problems[i].id, text) for text in spoken], batch.grader.same)

    return _of_samples(batch, groups, batch.config, vote, scored=False)


def nabla(batch: Batch, sampler: Sampler | None = None, proposal: str | None = None) -> list[Answer]:
    """∇-Reasoner with n rollouts at most: `nabla_fast.generate`, its models made ready once.

    Args:
        sampler: as in `nabla_fast.generate.run`.
        proposal: replaces that of the settings; "likeliest" is the control, which takes no gradient.
    """
    config = batch.config.replace(max_rollouts=batch.n, proposal=proposal or batch.config.proposal)
    pair = batch.models.pair
    answers: dict[int, Answer] = {}

    def end(response: Response) -> None:
        reward, stats = response.current.reward, response.stats
        first = stats.revisions[0].old_reward if stats.revisions else reward
        tokens = response.current.tokens
        answers[response.index] = _answer(batch, response.index, tokens, (first, reward), stats, conversations=1)
        batch.on_answer(response.index, answers[response.index])

    rule = stop_rule(pair, config)
    run(pair, batch.prompt_ids, batch.frames, config, rule, sampler, seeds=batch.seeds, on_end=end)
    return [answers[i] for i in range(len(batch.problems))]


METHODS: dict[str, Callable[[Batch], list[Answer]]] = {
    "greedy": greedy,
    "self-consistency": self_consistency,
    "best-of-n": best_of_n,
    **{method: partial(nabla, proposal=proposal) for method, proposal in PROPOSALS.items()},
}


def draw(
    batch: Batch,
    config: NablaConfig,
    *,
    scored: bool,
    on_group: Callable[[int, baselines.Samples], None] = lambda *_: None,
) -> list[baselines.Samples]:
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
        on_group=on_group,
    )


def _of_samples(
    batch: Batch,
    groups: Sequence[baselines.Samples] | None,
    config: NablaConfig,
    choose: Callable[[int, baselines.Samples], int],
    *,
    scored: bool,
) -> list[Answer]:
    """One of each problem's samples."""
    answers: dict[int, Answer] = {}

    def end(i: int, group: baselines.Samples) -> None:
        chosen, stats = choose(i, group), group.stats
        rewards = None if group.rewards is None else (group.rewards[0], group.rewards[chosen])
        stats.finish_reason = group.records[chosen].finish_reason
        answers[i] = _answer(batch, i, group.sequences[chosen], rewards, stats, conversations=stats.reward_calls)
        batch.on_answer(i, answers[i])

    if groups is None:
        draw(batch, config, scored=scored, on_group=end)
    else:
        for i, group in enumerate(groups):
            end(i, group)
    return [answers[i] for i in range(len(batch.problems))]


def _answer(
    batch: Batch,
    i: int,
    tokens: Tensor,
    rewards: tuple[float, float] | None,
    stats: SequenceStats,
    *,
    conversations: int,
) -> Answer:
    frame = (len(batch.frames[i].opening), len(batch.frames[i].closing))
    work = Work(stats, len(batch.prompt_ids[i]), frame, len(tokens), conversations)
    flops = estimate(batch.models.sizes, work, batch.config)
    before, after = rewards or (None, None)
    text = batch.models.pair.tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(text, len(tokens), after, before, stats, flops, _spoken(batch, i, tokens))


def _spoken(batch: Batch, i: int, tokens: Tensor) -> str:
    return spoken(batch.models.pair.tokenizer, batch.prompt_ids[i], tokens.tolist())
