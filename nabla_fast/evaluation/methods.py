"""Decoding methods as the evaluation runs them: problems in, answers with their counters out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nabla_fast import baselines, search
from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.decoder import Sequence as Response
from nabla_fast.evaluation.batch import Answer, Batch, Models, load, make_batch
from nabla_fast.evaluation.flops import forward
from nabla_fast.generate import run, stop_rule
from nabla_fast.sampling import Sampler

__all__ = ["METHODS", "Answer", "Batch", "Models", "draw", "load", "make_batch"]

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
"""Methods whose n is `NablaConfig.max_rollouts`; to others it is the number of samples, or that of `SEARCHES`."""

SEARCHES = ("beam-search", "mcts")
"""Searches over steps: n is the number of candidates a step, and that of simulations."""


def greedy(batch: Batch) -> list[Answer]:
    """Greedy decoding, scored once, whatever the budget."""
    config = batch.config.replace(rollout=Sampling(temperature=0.0))
    batch = replace(batch, n=1, budget=None)
    return _of_samples(batch, config)


def best_of_n(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The best of n samples by reward; ``groups`` holds the samples of each problem where they are drawn already."""
    return _of_samples(batch, batch.config, groups)


def self_consistency(batch: Batch, groups: Sequence[baselines.Samples] | None = None) -> list[Answer]:
    """The majority of n samples; nothing is scored. ``groups`` as in `best_of_n`."""

    def vote(i: int, group: baselines.Samples) -> int:
        spoken = [batch.spoken(i, tokens) for tokens in group.sequences]
        return baselines.vote([batch.grader.answer(batch.problems[i].id, text) for text in spoken], batch.grader.same)

    return _of_samples(batch, batch.config, groups, vote)


def nabla(batch: Batch, sampler: Sampler | None = None, proposal: str | None = None) -> list[Answer]:
    """∇-Reasoner with n rollouts at most: `nabla_fast.generate`, its models made ready once.

    With a budget, a position is looked at while it is not spent, and rollouts are as many as the settings allow.

    Args:
        sampler: as in `nabla_fast.generate.run`.
        proposal: replaces that of the settings; "likeliest" is the control, which takes no gradient.
    """
    most = batch.config.max_rollouts if batch.budget else batch.n
    config = batch.config.replace(max_rollouts=most, proposal=proposal or batch.config.proposal)
    pair = batch.models.pair
    answers: dict[int, Answer] = {}

    def end(response: Response) -> None:
        i, tokens, reward, stats = response.index, response.current.tokens, response.current.reward, response.stats
        first = stats.revisions[0].old_reward if stats.revisions else reward
        answers[i] = batch.answer(i, tokens, (first, reward), stats, flops(response))

    def flops(response: Response) -> float:
        return batch.flops(response.index, response.stats, len(response.current.tokens), conversations=1)

    def enough(response: Response) -> bool:
        return batch.enough(response.stats, lambda: flops(response))

    rule = stop_rule(pair, config)
    run(pair, batch.prompt_ids, batch.frames, config, rule, sampler, seeds=batch.seeds, on_end=end, enough=enough)
    return [answers[i] for i in range(len(batch.problems))]


def search_steps(batch: Batch, find: Callable[..., search.Search], *, steps: bool) -> list[Answer]:
    """A reward-guided search over steps: n candidates a step or simulations; ``search_width ** 2`` with a budget."""
    sizes, settings = batch.models.sizes, batch.search
    answers: dict[int, Answer] = {}

    def flops(prompt: search.Prompt) -> float:
        return forward(sizes, prompt.language_tokens, prompt.reward_tokens)

    def enough(prompt: search.Prompt) -> bool:
        return batch.enough(prompt.stats, lambda: flops(prompt))

    def end(prompt: search.Prompt, response: search.Response) -> None:
        i, tokens = prompt.sequence.index, torch.tensor(response.tokens, dtype=torch.long)
        # What is scored first are prefixes, where rollouts end with a step.
        before = None if steps else next(iter(prompt.rewards.values()))
        answers[i] = batch.answer(i, tokens, (before, response.score), prompt.stats, flops(prompt))

    n = batch.n or settings.search_width**2
    begin = partial(find, n=n, settings=settings, enough=enough if batch.budget else None)
    asked = batch.models.pair, batch.prompt_ids, batch.frames, batch.config, settings, begin
    search.run(*asked, steps=steps, seeds=batch.seeds, batch_size=batch.size, on_end=end)
    return [answers[i] for i in range(len(batch.problems))]


METHODS: dict[str, Callable[[Batch], list[Answer]]] = {
    "greedy": greedy,
    "self-consistency": self_consistency,
    "best-of-n": best_of_n,
    **{method: partial(nabla, proposal=proposal) for method, proposal in PROPOSALS.items()},
    "beam-search": partial(search_steps, find=search.beam_search, steps=True),
    "mcts": partial(search_steps, find=search.mcts, steps=False),
}


def draw(
    batch: Batch,
    config: NablaConfig,
    *,
    scored: bool,
    on_group: Callable[[int, baselines.Samples], None] = lambda *_: None,
) -> list[baselines.Samples]:
    """n samples of each problem; with a budget, those that are begun while it is not spent.

    With a budget they are drawn in rounds, since nobody knows what one will cost. What is drawn beyond it is not
    counted, so that an answer does not depend on how many a round has. ``on_group`` hears of a problem, by its index,
    and its samples when it has all.
    """

    def some(rows: Sequence[int], n: int, **more: Any) -> list[baselines.Samples]:
        ids, frames = [batch.prompt_ids[i] for i in rows], [batch.frames[i] for i in rows]
        more |= {"scored": scored, "seeds": [batch.seeds[i] for i in rows], "batch_size": batch.size}
        return baselines.sample(batch.models.pair, ids, frames, n, config, **more)

    left, budget = list(range(len(batch.problems))), batch.budget
    if budget is None:
        return some(left, batch.n, on_group=on_group)
    drawn: dict[int, baselines.Samples] = {}
    groups: dict[int, baselines.Samples] = {}
    done, n = 0, 1
    while left:
        for i, more in zip(left, some(left, n, drawn_before=done), strict=True):
            drawn[i] = drawn[i].with_more(more) if i in drawn else more
        done, expected = done + n, 1
        for i in list(left):
            costs = [
                budget.spent(one, batch.flops(i, one, len(tokens), conversations=one.reward_calls))
                for one, tokens in zip(drawn[i].records, drawn[i].sequences, strict=True)
            ]
            if sum(costs) < budget.amount:
                expected = max(expected, math.ceil((budget.amount / sum(costs) - 1) * done))
                continue
            left.remove(i)
            groups[i] = drawn.pop(i).first(budget.within(costs))
            on_group(i, groups[i])
        # As many as are decoded together, but no more than will be needed.
        n = max(1, min(expected, batch.size // max(1, len(left))))
    return [groups[i] for i in range(len(batch.problems))]


def _of_samples(
    batch: Batch,
    config: NablaConfig,
    groups: Sequence[baselines.Samples] | None = None,
    vote: Callable[[int, baselines.Samples], int] | None = None,
) -> list[Answer]:
    """One of each problem's samples: the best, or what ``vote`` chooses without scores."""
    answers: dict[int, Answer] = {}

    def end(i: int, group: baselines.Samples) -> None:
        chosen, stats = vote(i, group) if vote else baselines.best(group), group.stats
        rewards = (None, None) if group.rewards is None else (group.rewards[0], group.rewards[chosen])
        stats.finish_reason = group.records[chosen].finish_reason
        tokens = group.sequences[chosen]
        flops = batch.flops(i, stats, len(tokens), conversations=stats.reward_calls)
        answers[i] = batch.answer(i, tokens, rewards, stats, flops)

    if groups is None:
        draw(batch, config, scored=vote is None, on_group=end)
    else:
        for i, group in enumerate(groups):
            end(i, group)
    return [answers[i] for i in range(len(batch.problems))]
