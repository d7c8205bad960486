"""Problems that are decoded together, and what a method makes of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nabla_fast.config import NablaConfig
from nabla_fast.evaluation.budget import Budget
from nabla_fast.evaluation.flops import Sizes, estimate, sizes
from nabla_fast.evaluation.grading import Grader
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.evaluation.thoughts import spoken
from nabla_fast.generate import Pair, make_pair
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.search_config import SearchConfig
from nabla_fast.stats import SequenceStats


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
        n: samples, rollouts at most, candidates a step or simulations; what has one n does not look at it. 0 with a
            budget, which says how many.
        size: most sequences to decode together.
        on_answer: hears of a problem, by its index, and its answer while others are under way.
        budget: what each problem may cost; None leaves that to ``n``.
        search: settings of the searches over steps.
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
    budget: Budget | None = None
    search: SearchConfig = field(default_factory=SearchConfig)

    def enough(self, stats: SequenceStats, flops: Callable[[], float]) -> bool:
        """Whether a problem has spent its budget, by its counters, and by its FLOPs where these count."""
        budget = self.budget
        if budget is None:
            return False
        return budget.spent(stats, flops() if budget.kind == "flops" else 0.0) >= budget.amount

    def flops(self, i: int, stats: SequenceStats, response: int, *, conversations: int) -> float:
        """FLOPs of samples or of the decode loop, for an answer of so many tokens to the i-th problem."""
        frame = len(self.frames[i].opening), len(self.frames[i].closing)
        asked = {"prompt": len(self.prompt_ids[i]), "response": response, "conversations": conversations}
        return estimate(self.models.sizes, stats, self.config, frame=frame, **asked)

    def spoken(self, i: int, tokens: Tensor) -> str:
        """A response (n,) to the i-th problem, without its thoughts."""
        return spoken(self.models.pair.tokenizer, self.prompt_ids[i], tokens.tolist())

    def answer(
        self, i: int, tokens: Tensor, rewards: tuple[float | None, float | None], stats: SequenceStats, flops: float
    ) -> Answer:
        """The answer to the i-th problem, told to ``on_answer``.

        Args:
            tokens: (n,) int64 of the response.
            rewards: of the first response drawn and of this one; None where there is no such thing.
            stats: counters of all that was drawn.
            flops: of all that was drawn.
        """
        text = self.models.pair.tokenizer.decode(tokens, skip_special_tokens=True)
        before, after = rewards
        answer = Answer(text, len(tokens), after, before, stats, flops, self.spoken(i, tokens))
        self.on_answer(i, answer)
        return answer


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
    **more: Any,
) -> Batch:
    """Prepares problems for a method; ``more`` are the other fields of `Batch`."""
    ids, frames = models.pair.prompts([problem.chat for problem in problems], config)
    return Batch(models, problems, ids, frames, seeds, grader, config, n, size, **more)
