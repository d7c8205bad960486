"""Searches over reasoning steps: what they have in common, and how those of many prompts run together.

A search is a generator. It yields the continuations that it wants drawn, and is sent the responses that came of them,
scored; what it returns is its answer. `run` drives the searches of a batch: their rollouts share a continuous batch,
their rewards share forward passes, and each continuation begins behind the KV caches of the response that it continues.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from nabla_fast.config import NablaConfig
from nabla_fast.generate import Pair, stop_rule
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.models.sequence_cache import SequenceCache, reach
from nabla_fast.objective import Objective
from nabla_fast.rollout import Rollout, RolloutStream, StopRule
from nabla_fast.sampling import sequence_seeds
from nabla_fast.search_config import SearchConfig
from nabla_fast.sequence import Sequence
from nabla_fast.stats import SequenceStats


@dataclass(frozen=True)
class StepRule(StopRule):
    """Ends a rollout at the end of a step, too.

    Attributes:
        separator, most: ``search_separator`` and ``search_tokens`` of `SearchConfig`.
    """

    separator: str = ""
    most: int = 64

    def ended(self, sequence: Sequence, response: tuple[int, ...]) -> bool:
        """See `StopRule`; what ``sequence.prefix`` holds are earlier steps."""
        return super().ended(sequence, response) or self.is_step(response[len(sequence.prefix) :])

    def is_step(self, tokens: tuple[int, ...]) -> bool:
        """Whether tokens drawn behind earlier steps are a whole step."""
        if len(tokens) >= self.most:
            return True
        return bool(tokens and self.separator) and self.separator in self.tokenizer.decode(list(tokens)).lstrip()


@dataclass(frozen=True)
class Response:
    """A response, complete or partial.

    Attributes:
        tokens: of the response.
        finished: whether it is complete.
        reward: as a whole or as a prefix; None where it was not scored.
        language_cache, reward_cache: of each model, from which continuations begin.
    """

    tokens: tuple[int, ...]
    finished: bool = False
    reward: float | None = None
    language_cache: SequenceCache | None = None
    reward_cache: SequenceCache | None = None

    @property
    def score(self) -> float:
        """The reward of what was scored."""
        assert self.reward is not None, "it was not scored"
        return self.reward

    def bare(self) -> Response:
        """Without its caches, for what is continued no more."""
        return replace(self, language_cache=None, reward_cache=None)


@dataclass(frozen=True)
class Draw:
    """Asks for a continuation.

    Attributes:
        parent: what it continues.
        seed: of its noise.
        scored: whether a partial response is scored; a complete one always is.
    """

    parent: Response
    seed: int
    scored: bool = True


Search = Generator[list[Draw], list[Response], Response]
"""Yields draws of which at least one is asked for; is sent their responses, in order; returns its answer."""


@dataclass
class Prompt:
    """What a search answers, and what that has taken.

    Attributes:
        sequence: prompt, seed, limit, frame, counters.
        stop: when a response is complete.
        rule: when a step is.
        language_tokens, reward_tokens: that went through each model. A rollout of k tokens counts k, since it feeds the
            token before its first one and not its last; those before it count where no cache holds them.
        rewards: of every response scored so far, in order, so that none is scored twice.
        empty: the response that searches begin with.
    """

    sequence: Sequence
    stop: StopRule
    rule: StepRule
    language_tokens: int = 0
    reward_tokens: int = 0
    rewards: dict[tuple[int, ...], float] = field(default_factory=dict)
    empty: Response = field(default_factory=lambda: Response(()))

    @property
    def stats(self) -> SequenceStats:
        """The counters."""
        return self.sequence.stats

    def seeds(self, tokens: tuple[int, ...], count: int, seed: int | None = None) -> list[int]:
        """Seeds of ``count`` continuations of a response; they depend on prompt, tokens and their number alone.

        Those of the empty response are the ones of the samples of `nabla_fast.baselines`.

        Args:
            seed: of the search; None takes the prompt's.
        """
        seed = self.sequence.seed if seed is None else seed
        own = [] if tokens else [seed]
        return [*own, *sequence_seeds(seed, [(*self.sequence.prompt_ids, *tokens)] * (count - len(own)))]


@dataclass(eq=False)
class _Running:
    """A search under way.

    Attributes:
        draws: what it has asked for.
        drawn: index of a draw → what has come of it, and the sequence that drew it.
    """

    prompt: Prompt
    search: Search
    draws: list[Draw] = field(default_factory=list)
    drawn: dict[int, tuple[Response, Sequence]] = field(default_factory=dict)

    @property
    def ended(self) -> list[tuple[Response, Sequence]]:
        """What has come of the draws when all have ended, in their order."""
        return [self.drawn[i] for i in range(len(self.draws))]


def run(
    pair: Pair,
    prompt_ids: Seq[tuple[int, ...]],
    frames: Seq[RewardFrame],
    config: NablaConfig,
    settings: SearchConfig,
    search: Callable[[Prompt], Search],
    *,
    steps: bool,
    seeds: Seq[int] | None = None,
    batch_size: int | None = None,
    on_end: Callable[[Prompt, Response], None] = lambda *_: None,
) -> list[tuple[Prompt, Response]]:
    """Searches for an answer to each of B token prompts (B), and returns what was found, in their order.

    Args:
        frames: (B) what the reward model sees around a response.
        search: begins the search of a prompt.
        steps: whether rollouts end at the end of a step; otherwise with the response.
        seeds: (B) of the prompts; None takes those of ``config.seed``.
        batch_size: most rollouts under way together; None sets no limit.
        on_end: hears of a prompt and its answer when it is found.

    Raises:
        ValueError: if ``batch_size`` is below 1, or a prompt leaves no room for a response.
        FloatingPointError: if a model gives NaN or infinite values.
        RolloutError: if rollouts cannot be had any more.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    stop = stop_rule(pair, config)
    parts = (stop.eos_token_ids, stop.stop_strings, stop.tokenizer, stop.criteria)
    rule = StepRule(*parts, settings.search_separator, settings.search_tokens)
    prompts = [Prompt(sequence, stop, rule) for sequence in pair.sequences(prompt_ids, frames, config, seeds)]
    answers: dict[int, Response] = {}
    # Without the gradient cache, as in `nabla_fast.baselines.sample`: others in the batch make no reward known.
    own = config.replace(gradient_cache=False)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        Objective(pair.language_model, pair.reward_model, own) as objective,
        closing(pair.rollouts(own).open(config.rollout, rule if steps else stop)) as stream,
    ):
        driver = _Driver(pair, objective, stream, steps, batch_size)
        for prompt, answer in driver.answers(prompts, search):
            prompt.stats.finish_reason = stop.finish_reason(prompt.sequence, answer.tokens)
            answers[prompt.sequence.index] = answer
            on_end(prompt, answer)
    return [(prompt, answers[prompt.sequence.index]) for prompt in prompts]


class _Driver:
    """Runs searches together, as `run` says."""

    def __init__(
        self, pair: Pair, objective: Objective, stream: RolloutStream, steps: bool, batch_size: int | None
    ) -> None:
        self._language = pair.language_model
        self._reward = pair.reward_model
        self._objective = objective
        self._stream = stream
        self._steps = steps
        self._batch_size = batch_size
        self._under_way: dict[Sequence, tuple[_Running, int]] = {}

    def answers(
        self, prompts: Seq[Prompt], search: Callable[[Prompt], Search]
    ) -> Generator[tuple[Prompt, Response], None, None]:
        """Each prompt and its answer, when it is found."""
        waiting, queue = deque(prompts), deque[tuple[_Running, int]]()

        def ask(one: _Running, draws: list[Draw]) -> None:
            one.draws, one.drawn = draws, {}
            queue.extend((one, i) for i in range(len(draws)))

        while waiting or queue or self._under_way:
            while (waiting or queue) and (self._batch_size is None or len(self._under_way) < self._batch_size):
                if not queue:
                    prompt = waiting.popleft()
                    self._open(prompt)
                    one = _Running(prompt, search(prompt))
                    ask(one, next(one.search))
                self._submit(*queue.popleft())
            complete = self._collect()
            self._score(complete)
            for one in complete:
                known = one.prompt.rewards
                responses = [replace(response, reward=known.get(response.tokens)) for response, _ in one.ended]
                try:
                    ask(one, one.search.send(responses))
                except StopIteration as end:
                    yield one.prompt, end.value

    def _open(self, prompt: Prompt) -> None:
        """Reads the prompt once for all continuations, where caches can be shared by them."""
        sequence = prompt.sequence
        nothing = torch.empty(0, dtype=torch.long)
        cache = self._objective.language_cache(sequence)
        if self._language.backbone.cache_kind == "prefix":
            with self._objective.clock.phase("rollout", [sequence.stats]):
                reach(self._language.backbone, self._language.embedding, [cache], [nothing])
            prompt.language_tokens += len(sequence.prompt_ids)
        opening = 0 if sequence.frame is None else len(sequence.frame.opening)
        if self._reward.supports_prefix_cache and opening:
            self._objective.read([sequence], [nothing])
            prompt.reward_tokens += opening
        prompt.empty = Response((), language_cache=cache, reward_cache=sequence.reward_cache)
        sequence.release()

    def _submit(self, one: _Running, i: int) -> None:
        draw, whole = one.draws[i], one.prompt.sequence
        parent = draw.parent
        most = len(parent.tokens) + one.prompt.rule.most if self._steps else whole.limit
        sequence = replace(
            whole,
            prefix=parent.tokens,
            seed=draw.seed,
            limit=min(whole.limit, most),
            drawn=[],
            # Copies, since those of the new response take their place.
            language_cache=copy.copy(parent.language_cache),
            reward_cache=copy.copy(parent.reward_cache),
        )
        # Without the last token, which is fed again, and counts as one of the rollout's.
        unread = len(whole.prompt_ids) + len(parent.tokens) - 1 - _covered(parent.language_cache, parent.tokens)
        one.prompt.language_tokens += max(0, unread)
        self._under_way[sequence] = one, i
        self._stream.submit(sequence)

    def _collect(self) -> list[_Running]:
        """Waits until rollouts have ended; the searches that have all that they asked for."""
        with self._objective.clock.phase("rollout", [sequence.stats for sequence in self._under_way]):
            ended = self._stream.collect()
        touched: dict[_Running, None] = {}
        for sequence, rollout in ended:
            one, i = self._under_way.pop(sequence)
            one.drawn[i] = self._response(one.prompt, sequence, rollout), sequence
            touched[one] = None
        return [one for one in touched if len(one.drawn) == len(one.draws)]

    def _response(self, prompt: Prompt, sequence: Sequence, rollout: Rollout) -> Response:
        """The response that a rollout has made, counted and not scored yet."""
        new = len(rollout.tokens)
        prompt.stats.rollouts += 1
        prompt.stats.generated_tokens += new
        prompt.stats.rollout_calls += rollout.calls
        prompt.language_tokens += new
        tokens = (*sequence.prefix, *rollout.tokens.tolist())
        cache = sequence.language_cache
        assert cache is not None, "it was copied from the response that it continues"
        cache.keep(torch.tensor(tokens[:-1], dtype=torch.long), rollout.cache)
        finished = not self._steps or prompt.stop.ended(prompt.sequence, tokens)
        return Response(tokens, finished, None, cache, sequence.reward_cache)

    def _score(self, complete: Seq[_Running]) -> None:
        """Scores what is to be scored, each response of a prompt once."""
        unknown: dict[tuple[_Running, tuple[int, ...]], tuple[Prompt, Sequence, Response]] = {}
        for one in complete:
            for draw, (response, sequence) in zip(one.draws, one.ended, strict=True):
                if (draw.scored or response.finished) and response.tokens not in one.prompt.rewards:
                    unknown.setdefault((one, response.tokens), (one.prompt, sequence, response))
        asked = list(unknown.values())
        size = self._batch_size or max(1, len(asked))
        for first in range(0, len(asked), size):
            some = asked[first : first + size]
            for prompt, sequence, response in some:
                prompt.reward_tokens += self._unscored(sequence, response)
            responses = [torch.tensor(response.tokens, dtype=torch.long) for _, _, response in some]
            ended = [response.finished for *_, response in some]
            rewards = self._objective.rewards([own for _, own, _ in some], responses, keep=True, ended=ended)
            for (prompt, _, response), reward in zip(some, rewards, strict=True):
                prompt.rewards[response.tokens] = reward

    def _unscored(self, sequence: Sequence, response: Response) -> int:
        """Tokens of a conversation that the reward model has to read."""
        frame = sequence.frame
        assert frame is not None, "a sequence without a frame is not scored"
        tokens = torch.tensor(response.tokens, dtype=torch.long)
        read = tuple(self._reward.reading(tokens, frame).tokens.tolist())
        length = len(frame.opening) + len(read)
        closing = len(frame.closing) if response.finished else 0
        covered = _covered(sequence.reward_cache, read) if self._reward.supports_prefix_cache else 0
        return length + closing - min(length, covered)


def _covered(cache: SequenceCache | None, tokens: tuple[int, ...]) -> int:
    """Tokens of prompt and response that a cache holds, which may be that of a response that only begins alike."""
    if cache is None:
        return 0
    pairs = zip(cache.tokens.tolist(), tokens, strict=False)
    length = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(cache.tokens), len(tokens)))
    return 0 if cache.before(length) is None else len(cache.prompt) + length
