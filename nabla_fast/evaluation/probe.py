"""What each proposal would do at the uncertain positions of a few answers, with every token in question tried out.

An evaluation needs many problems to tell two proposals apart, because most answers are the same with either. A probe
looks at the positions where they choose, and rolls all candidates out there: what every proposal picks is judged by
the same rollouts. `nabla_fast.evaluation.probe_report` makes figures of it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import NablaConfig, require_int
from nabla_fast.decoder import Decoder
from nabla_fast.evaluation.grading import GradingError
from nabla_fast.evaluation.methods import Models
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.evaluation.thoughts import spoken
from nabla_fast.generate import stop_rule
from nabla_fast.objective import Objective
from nabla_fast.proposals import PROPOSALS, Proposer
from nabla_fast.rollout import RolloutBackend, StopRule, rollout
from nabla_fast.sampling import sequence_seeds
from nabla_fast.sequence import Sequence as Response
from nabla_fast.stats import SequenceStats


@dataclass(frozen=True)
class Candidate:
    """A token that was tried at a fork.

    Attributes:
        token: its id.
        log_prob: log-likelihood under the language model.
        prefix_reward: reward of the response so far with the token behind it; None where no proposal was asked.
        reward: of the response that it was rolled out to; of the present token, that of the response as it was drawn.
        right: whether the grader takes that response as right; None without a grader.
        response: all tokens of that response.
        tokens: how many were drawn for it.
    """

    token: int
    log_prob: float
    prefix_reward: float | None
    reward: float
    right: bool | None
    response: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Fork:
    """A position at which a decode would look for another token.

    Attributes:
        problem: id.
        position: in the response, from 0.
        length: of the response as it was drawn, in tokens.
        confidence: largest probability of the position.
        candidates: the present token first, then the likeliest others and what the proposals chose.
        chosen: proposal → the token that it chose.
        calls: proposal → model calls for choosing.
        seconds: proposal → seconds for choosing.
    """

    problem: str
    position: int
    length: int
    confidence: float
    candidates: tuple[Candidate, ...]
    chosen: Mapping[str, int]
    calls: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def present(self) -> Candidate:
        """The token of the response as it was drawn."""
        return self.candidates[0]

    def of(self, proposal: str) -> Candidate:
        """What a proposal chose."""
        return next(c for c in self.candidates if c.token == self.chosen[proposal])


@dataclass(frozen=True)
class Drawn:
    """An answer as it was drawn.

    Attributes:
        problem: id.
        reward: of it.
        right: whether the grader takes it as right; None without a grader.
        response: its tokens.
        forks: how many were looked at.
    """

    problem: str
    reward: float
    right: bool | None
    response: tuple[int, ...]
    forks: int


@dataclass
class Probe:
    """Everything that was looked at."""

    answers: list[Drawn]
    forks: list[Fork]


def probe(
    models: Models,
    task: Task,
    config: NablaConfig,
    *,
    forks: int = 3,
    labels: bool = True,
    batch_size: int = 8,
    proposals: Sequence[str] = tuple(PROPOSALS),
    on_problems: Callable[[int], None] = lambda _: None,
) -> Probe:
    """Draws an answer to each problem, and tries every candidate out at its first uncertain positions.

    Args:
        config: thresholds say what is uncertain, ``candidates`` how many tokens are tried, ``rollout`` how they are
            rolled out. The gradient cache is off: each proposal pays for itself.
        forks: most positions of an answer.
        labels: have the task's grader say what is right; False leaves it unasked.
        batch_size: most problems, and most rollouts, at once.
        proposals: which are asked; none where the candidates alone are wanted, whose prefixes are not scored then.
        on_problems: hears how many problems more are done.

    Raises:
        ValueError: if ``forks`` or ``batch_size`` is below 1, or a prompt leaves no room for a response.
        GradingError: if a problem cannot be graded.
        FloatingPointError: if a model gives NaN or infinite values.

    Warns:
        UserWarning: for an answer that the grader fails on; it counts as wrong.
    """
    require_int("forks", forks, minimum=1)
    require_int("batch_size", batch_size, minimum=1)
    for problem in task.problems if labels else ():
        task.grader.check(problem.id, problem.reference)
    config = config.replace(gradient_cache=False, max_batch_size=batch_size, proposal="dto")
    # By all problems, so that the answers are those of an evaluation with this seed, whatever the batch size.
    seeds = sequence_seeds(config.seed, [models.prompt_ids(problem) for problem in task.problems])
    found = Probe([], [])
    pair = models.pair
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        Objective(pair.language_model, pair.reward_model, config) as objective,
    ):
        prober = _Prober(models, task, objective, labels, proposals)
        for first in range(0, len(task.problems), batch_size):
            some = slice(first, first + batch_size)
            prober.look(task.problems[some], seeds[some], forks, found)
            on_problems(len(task.problems[some]))
    return found


_Ended = tuple[float, bool | None, tuple[int, ...], int]
"""Reward, whether it is right, all tokens, and how many of them were drawn."""


class _Prober:
    """Looks at the forks of some problems at a time."""

    def __init__(
        self, models: Models, task: Task, objective: Objective, labels: bool, proposals: Sequence[str]
    ) -> None:
        self.models, self.task, self.objective, self.labels = models, task, objective, labels
        self.proposals = proposals
        self.config = objective.config
        self.stop: StopRule = stop_rule(models.pair, self.config)
        self.rollouts: RolloutBackend = models.pair.rollouts(self.config)
        self.decoder = Decoder(objective, self.rollouts, models.pair.sampler, self.stop)

    def look(self, problems: Sequence[Problem], seeds: Sequence[int], forks: int, found: Probe) -> None:
        ids, frames = self.models.pair.prompts([problem.chat for problem in problems], self.config)
        responses = self.models.pair.sequences(ids, frames, self.config, seeds)
        self._draw(responses)
        rights = {response: self._right(problems[response.index], response.current.tokens) for response in responses}
        positions = {response: response.current.uncertain.nonzero().flatten().tolist() for response in responses}
        for response in responses:
            told = problems[response.index].id, response.current.reward, rights[response]
            tokens = tuple(response.current.tokens.tolist())
            found.answers.append(Drawn(*told, tokens, min(forks, len(positions[response]))))
        for rank in range(forks):
            live = [response for response in responses if len(positions[response]) > rank]
            for response in live:
                response.position = positions[response][rank]
            if live:
                found.forks += self._forks(problems, live, rights)
        for response in responses:
            response.release()

    def _draw(self, responses: Sequence[Response]) -> None:
        """The first trajectories, scored."""
        rolling = set(responses)
        with closing(self.rollouts.open(self.config.rollout, self.stop)) as stream:
            for response in responses:
                self.decoder.roll_out(response, (), stream)
            while rolling:
                self.decoder.accept(self.decoder.collect(rolling, stream))

    def _forks(
        self, problems: Sequence[Problem], live: Sequence[Response], rights: Mapping[Response, bool | None]
    ) -> list[Fork]:
        """One fork of each response, at its position."""
        chosen, calls, seconds = self._choose(live)
        latents = torch.cat([r.current.latents[r.position : r.position + 1] for r in live])
        log_probs = self.objective.language_model.logits(latents).float().log_softmax(1)
        likely = log_probs.topk(min(self.config.candidates + 1, log_probs.shape[1])).indices.tolist()
        tokens = []
        for i, response in enumerate(live):
            present = int(response.current.tokens[response.position])
            others = [token for token in likely[i] if token != present][: self.config.candidates]
            tokens.append(list(dict.fromkeys([present, *others, *(own[i] for own in chosen.values())])))
        prefixes = [response.current.tokens[: response.position] for response in live]
        before: list[Any] = [[None] * len(own) for own in tokens]
        if self.proposals:
            before = self.objective.prefix_rewards(live, prefixes, tokens)
        ended = self._roll_out(problems, live, [own[1:] for own in tokens])
        forks = []
        for i, response in enumerate(live):
            own = log_probs[i, torch.tensor(tokens[i], device=log_probs.device)].tolist()
            drawn = tuple(response.current.tokens.tolist())
            tried = [(response.current.reward, rights[response], drawn, 0), *ended[response.index]]
            forks.append(
                Fork(
                    problems[response.index].id,
                    response.position,
                    len(response.current.tokens),
                    float(log_probs[i].max().exp()),
                    tuple(Candidate(t, p, b, *e) for t, p, b, e in zip(tokens[i], own, before[i], tried, strict=True)),
                    {name: picked[i] for name, picked in chosen.items()},
                    {name: count[i] for name, count in calls.items()},
                    dict(seconds),
                )
            )
        return forks

    def _choose(self, live: Sequence[Response]) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, float]]:
        """Proposal → for each response the token and the model calls, and the seconds of one."""
        by = Proposer(self.objective, self.models.pair.sampler, self._phase)
        chosen, calls, seconds = {}, {}, {}
        for name in self.proposals:
            for response in live:
                # Counters of its own, so that they are what this proposal takes.
                response.stats = SequenceStats()
            start = time.perf_counter()
            chosen[name] = PROPOSALS[name](live, by)
            seconds[name] = (time.perf_counter() - start) / len(live)
            calls[name] = [response.stats.model_calls for response in live]
        return chosen, calls, seconds

    def _roll_out(
        self, problems: Sequence[Problem], live: Sequence[Response], tokens: Sequence[Sequence[int]]
    ) -> dict[int, list[_Ended]]:
        """Index of a response → what each of its tokens was rolled out to."""
        # The noise of a position is that of the response, as in a decode.
        rows = [
            Response(r.prompt_ids, (*r.committed, token), r.seed, r.limit, r.frame, index=r.index)
            for r, own in zip(live, tokens, strict=True)
            for token in own
        ]
        ended: dict[int, list[_Ended]] = {response.index: [] for response in live}
        for first in range(0, len(rows), self.config.max_batch_size):
            some = rows[first : first + self.config.max_batch_size]
            drawn = rollout(self.rollouts, some, self.config.rollout, self.stop)
            responses = [torch.cat([d.tokens.new_tensor(r.prefix), d.tokens]) for r, d in zip(some, drawn, strict=True)]
            rewards = self.objective.rewards(some, responses)
            for row, new, response, reward in zip(some, drawn, responses, rewards, strict=True):
                right = self._right(problems[row.index], response)
                ended[row.index].append((reward, right, tuple(response.tolist()), len(new.tokens)))
                row.release()
        return ended

    def _right(self, problem: Problem, tokens: Tensor) -> bool | None:
        if not self.labels:
            return None
        text = spoken(self.models.pair.tokenizer, self.models.prompt_ids(problem), tokens.tolist())
        grader = self.task.grader
        try:
            return grader.right(problem.id, problem.reference, grader.answer(problem.id, text))
        except GradingError as error:
            warnings.warn(f"an answer to {problem.id} counts as wrong: {error}", stacklevel=2)
            return False

    def _phase(self, name: str, sequences: Sequence[Response]) -> AbstractContextManager[None]:
        return self.objective.clock.phase(name, [sequence.stats for sequence in sequences])
