"""Decoding methods to compare with, counted the same way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from nabla_fast import search
from nabla_fast.comparison import highest
from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.decoder import Observer
from nabla_fast.generate import NablaOutput, Pair, generate, make_pair, stop_rule
from nabla_fast.models.chat import Chat, as_chats
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.objective import Objective
from nabla_fast.record import Details
from nabla_fast.rollout import StopRule
from nabla_fast.sampling import sequence_seeds
from nabla_fast.search_config import SearchConfig
from nabla_fast.sequence import Sequence
from nabla_fast.stats import SequenceStats, Stats

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Independent answers to one prompt.

    Attributes:
        sequences: n tensors (n_j,) int64 of response token ids, on the CPU.
        rewards: n rewards, or None where nothing was scored.
        records: what each of them took.
    """

    sequences: list[Tensor]
    rewards: list[float] | None
    records: list[SequenceStats]

    @property
    def stats(self) -> SequenceStats:
        """What they took together."""
        return Stats(self.records).totals

    def first(self, n: int) -> Samples:
        """The first ``n``: what drawing only so many would have given."""
        rewards = None if self.rewards is None else self.rewards[:n]
        return Samples(self.sequences[:n], rewards, self.records[:n])

    def with_more(self, later: Samples) -> Samples:
        """These, and those of a later call behind them; both are scored, or neither is."""
        rewards = None if self.rewards is None or later.rewards is None else [*self.rewards, *later.rewards]
        return Samples([*self.sequences, *later.sequences], rewards, [*self.records, *later.records])


def greedy(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    config: NablaConfig | None = None,
    *,
    observer: Observer | None = None,
) -> NablaOutput:
    """Greedy decoding, scored once. Arguments as in `nabla_fast.generate`; ``config`` gives lengths and stops."""
    config = greedy_settings(config or NablaConfig())
    output = generate(model, tokenizer, reward_model, reward_tokenizer, prompts, config, observer=observer)
    for detail in output.details:
        detail.method = "greedy"
    return output


def greedy_settings(config: NablaConfig) -> NablaConfig:
    """``config`` with one rollout, in which the likeliest token is always taken."""
    # "guided" would choose tokens by their rewards.
    return config.replace(max_rollouts=1, rollout=Sampling(temperature=0.0), proposal="dto")


def best_of_n(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    n: int,
    config: NablaConfig | None = None,
) -> NablaOutput:
    """The answer with the highest reward among ``n`` samples, the first of equals; every sample is scored.

    Arguments as in `nabla_fast.generate`; ``config`` gives sampling (``rollout``), lengths, stops and seed. The first
    sample is the one that ``generate`` starts from, and those of a smaller ``n`` are among those of a larger one.
    """
    config, chats = config or NablaConfig(), as_chats(prompts)
    pair = make_pair(model, tokenizer, reward_model, reward_tokenizer, config)
    groups = sample(pair, *pair.prompts(chats, config), n, config, scored=True)
    return _chosen(groups, [best(group) for group in groups], f"Best-of-{n}", pair, config, chats)


def self_consistency(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    n: int,
    answer: Callable[[str], T | None],
    same: Callable[[T, T], bool],
    config: NablaConfig | None = None,
) -> NablaOutput:
    """The first of ``n`` samples whose answer is the most frequent one; nothing is scored, so rewards are NaN.

    Args:
        answer: what a text gives as its answer; None if it gives none.
        same: whether two answers are the same.

    The others as in `best_of_n`.
    """
    config, chats = config or NablaConfig(), as_chats(prompts)
    pair = make_pair(model, tokenizer, reward_model, reward_tokenizer, config)
    groups = sample(pair, *pair.prompts(chats, config), n, config, scored=False)
    texts = [[tokenizer.decode(y, skip_special_tokens=True) for y in group.sequences] for group in groups]
    votes = [vote([answer(text) for text in some], same) for some in texts]
    return _chosen(groups, votes, f"self-consistency of {n}", pair, config, chats)


def beam_search(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    n: int,
    config: NablaConfig | None = None,
    steps: SearchConfig | None = None,
) -> NablaOutput:
    """The answer of a beam search over reasoning steps, with ``n`` candidates a step: `nabla_fast.search.beam_search`.

    Args:
        n: at least 1.
        steps: what a step is, and how many continue one; None takes the defaults.

    The others as in `best_of_n`.
    """
    return _search(search.beam_search, (model, tokenizer, reward_model, reward_tokenizer), prompts, n, config, steps)


def mcts(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    n: int,
    config: NablaConfig | None = None,
    steps: SearchConfig | None = None,
) -> NablaOutput:
    """The best answer of ``n`` simulations of a Monte-Carlo tree search: `nabla_fast.search.mcts`.

    Arguments as in `beam_search`.
    """
    return _search(search.mcts, (model, tokenizer, reward_model, reward_tokenizer), prompts, n, config, steps)


def best(group: Samples) -> int:
    """Index of the highest reward, the first of equals."""
    assert group.rewards is not None, "the samples were not scored"
    return highest(group.rewards)


def vote(answers: Seq[T | None], same: Callable[[T, T], bool]) -> int:
    """Index of the first answer of the largest group of same answers, the earliest of equally large groups.

    None has no vote; where all are None, the index is 0.
    """
    groups: list[tuple[T, list[int]]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        for first, voters in groups:
            if same(first, answer):
                voters.append(i)
                break
        else:
            groups.append((answer, [i]))
    return max((voters for _, voters in groups), key=len, default=[0])[0]


def sample(
    pair: Pair,
    prompt_ids: Seq[tuple[int, ...]],
    frames: Seq[RewardFrame],
    n: int,
    config: NablaConfig,
    *,
    scored: bool,
    seeds: Seq[int] | None = None,
    drawn_before: int = 0,
    batch_size: int | None = None,
    on_group: Callable[[int, Samples], None] = lambda *_: None,
) -> list[Samples]:
    """Draws ``n`` answers to each of B token prompts, with ``config.rollout``, and scores them if asked to.

    No gradient, hidden state or statistic beyond what sampling needs is kept or charged.

    Args:
        frames: (B) what the reward model sees around a response.
        seeds: (B) of the prompts; None takes those of ``config.seed``.
        drawn_before: samples of each prompt that an earlier call has drawn; these are the ones that follow.
        batch_size: most answers that are decoded together; None decodes all together.
        on_group: hears of a prompt, by its index, and its samples when the last of them has ended.

    Raises:
        ValueError: if ``n`` or ``batch_size`` is below 1, or a prompt leaves no room for a response.
        FloatingPointError: if a model gives NaN or infinite values.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rows = [
        Sequence(prompt.prompt_ids, (), seed, prompt.limit, prompt.frame, index=prompt.index * n + j)
        for prompt in pair.sequences(prompt_ids, frames, config, seeds)
        for j, seed in enumerate(sample_seeds(prompt.seed, prompt.prompt_ids, drawn_before + n)[drawn_before:])
    ]
    drawn: dict[int, Tensor] = {}
    rewards: dict[int, float] = {}
    groups: dict[int, Samples] = {}
    size = batch_size or len(rows)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    # Without the gradient cache, so that a sample costs one reward call whatever the others say.
    own = config.replace(gradient_cache=False)
    with (
        # A caller's inference mode would make tensors that the reward model's autograd cannot use.
        torch.inference_mode(False),
        torch.no_grad(),
        Objective(pair.language_model, pair.reward_model, own) as objective,
        closing(_draw(pair, objective, batches, config.rollout, stop_rule(pair, config))) as drawing,
    ):
        for ended in drawing:
            scores = objective.rewards([*ended], [*ended.values()]) if scored else []
            rewards.update((sequence.index, reward) for sequence, reward in zip(ended, scores, strict=False))
            for sequence, tokens in ended.items():
                drawn[sequence.index] = tokens
                sequence.release()  # nobody asks for the caches of a scored answer again
            for i in sorted({sequence.index // n for sequence in ended}):
                group = range(i * n, (i + 1) * n)
                if all(j in drawn for j in group):
                    own_rewards = [rewards[j] for j in group] if scored else None
                    groups[i] = Samples([drawn[j] for j in group], own_rewards, [rows[j].stats for j in group])
                    on_group(i, groups[i])
    return [groups[i] for i in range(len(prompt_ids))]


def sample_seeds(first: int, prompt_ids: tuple[int, ...], n: int) -> list[int]:
    """The seeds of ``n`` samples of a prompt: its own seed, and others that depend on it and on their number alone."""
    return [first, *sequence_seeds(first, [prompt_ids] * (n - 1))]


def _draw(
    pair: Pair, objective: Objective, batches: Seq[Seq[Sequence]], sampling: Sampling, stop: StopRule
) -> Generator[dict[Sequence, Tensor], None, None]:
    """Sequence → its tokens, of those that ended together, until all have; one batch after the other."""
    for rows in batches:
        running = set(rows)
        with closing(pair.rollouts(objective.config).open(sampling, stop)) as stream:
            for sequence in rows:
                stream.submit(sequence)
            while running:
                with objective.clock.phase("rollout", [sequence.stats for sequence in running]):
                    ended = stream.collect()
                for sequence, drawn in ended:
                    running.remove(sequence)
                    sequence.stats.finish_reason = stop.finish_reason(sequence, tuple(drawn.tokens.tolist()))
                    sequence.stats.rollouts += 1
                    sequence.stats.generated_tokens += len(drawn.tokens)
                    sequence.stats.rollout_calls += drawn.calls
                yield {sequence: drawn.tokens for sequence, drawn in ended}


def _search(
    method: Callable[..., search.Search],
    models: tuple[Any, Any, Any, Any],
    prompts: Any,
    n: int,
    config: NablaConfig | None,
    steps: SearchConfig | None,
) -> NablaOutput:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    config, steps = config or NablaConfig(), steps or SearchConfig()
    pair, chats = make_pair(*models, config), as_chats(prompts)
    begin, by_steps = partial(method, n=n, settings=steps), method is search.beam_search
    found = search.run(pair, *pair.prompts(chats, config), config, steps, begin, steps=by_steps)
    tokens = [torch.tensor(response.tokens, dtype=torch.long) for _, response in found]
    name = "beam search" if by_steps else "MCTS"
    return NablaOutput(
        texts=[pair.tokenizer.decode(y, skip_special_tokens=True) for y in tokens],
        sequences=tokens,
        rewards=[response.score for _, response in found],
        stats=Stats([prompt.stats for prompt, _ in found]),
        details=[
            Details(c, config, pair.tokenizer, y.tolist(), method=name) for c, y in zip(chats, tokens, strict=True)
        ],
    )


def _chosen(
    groups: Seq[Samples], indices: Seq[int], method: str, pair: Pair, config: NablaConfig, chats: Seq[Chat]
) -> NablaOutput:
    chosen = list(zip(groups, indices, strict=True))
    tokens = [group.sequences[i] for group, i in chosen]
    return NablaOutput(
        texts=[pair.tokenizer.decode(y, skip_special_tokens=True) for y in tokens],
        sequences=tokens,
        rewards=[float("nan") if group.rewards is None else group.rewards[i] for group, i in chosen],
        stats=Stats([group.stats for group in groups]),
        details=[
            Details(chat, config, pair.tokenizer, y.tolist(), samples=group.rewards or (), method=method)
            for chat, y, group in zip(chats, tokens, groups, strict=True)
        ],
    )
