"""∇-Reasoner's decode loop (Alg. 1 and 3), over a batch of sequences.

The steps are numbered as in the design: 1 roll out, 2 select, 3 optimise, 4 resample, 5 propose and accept, 6 stop.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nabla_fast import dto, ops
from nabla_fast.config import NablaConfig
from nabla_fast.objective import Conversation, Objective
from nabla_fast.rollout import Rollout, RolloutBackend, StopRule
from nabla_fast.sampling import Context, Sampler
from nabla_fast.selection import Candidates, select
from nabla_fast.stats import Revision, SequenceStats


class Observer(Protocol):
    """Hears of a decode while it runs."""

    def on_phase(self, phase: str, sequences: int) -> None:
        """A phase of `nabla_fast.stats.PHASES` begins for so many sequences."""

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        """Sequence ``index`` has committed ``tokens`` of a response that is ``length`` tokens long as it stands."""


@dataclass(frozen=True)
class Trajectory:
    """A complete response.

    Attributes:
        tokens: (n,) int64.
        latents: (n, d) the hidden state that predicts each token.
        hard: (n,) int64 what DTO takes the tokens ahead to be, before its first step.
        uncertain: (n,) bool, True where entropy and confidence ask for optimisation.
        reward: of the whole response.
    """

    tokens: Tensor
    latents: Tensor
    hard: Tensor
    uncertain: Tensor
    reward: float


@dataclass
class Sequence:
    """One response in the making.

    Attributes:
        index: in the batch.
        conversation: prompt and counters.
        seed: of its noise.
        position: number of committed tokens.
        trajectory: the committed tokens and those ahead; None before the first rollout.
    """

    index: int
    conversation: Conversation
    seed: int
    position: int = 0
    trajectory: Trajectory | None = None

    @property
    def current(self) -> Trajectory:
        assert self.trajectory is not None, "the first rollout has not been drawn"
        return self.trajectory

    @property
    def stats(self) -> SequenceStats:
        return self.conversation.stats

    @property
    def committed(self) -> tuple[int, ...]:
        return tuple(self.current.tokens[: self.position].tolist())

    def context(self, response: tuple[int, ...]) -> Context:
        """This sequence after ``response``, waiting for its next token."""
        return Context(self.conversation.prompt_ids, response, self.seed, self.conversation.limit)

    @property
    def finished(self) -> bool:
        return self.position >= len(self.current.tokens)


class Decoder:
    """Decodes sequences with one pair of models.

    Args:
        objective: the models, their gradients, the clock.
        rollouts: where trajectories come from.
        sampler: draws the resampled token.
        stop: when a response has ended.
        observer: hears of progress; None for nobody.
    """

    def __init__(
        self,
        objective: Objective,
        rollouts: RolloutBackend,
        sampler: Sampler,
        stop: StopRule,
        observer: Observer | None = None,
    ) -> None:
        self.objective = objective
        self.config: NablaConfig = objective.config
        self.rollouts = rollouts
        self.sampler = sampler
        self.stop = stop
        self.observer = observer

    @torch.no_grad()
    def decode(self, sequences: Seq[Sequence]) -> None:
        """Runs every sequence to its end; the results are in the sequences."""
        first = self.roll_out(sequences, [()] * len(sequences))
        for sequence, trajectory in zip(sequences, first, strict=True):
            sequence.trajectory = trajectory
        active = self.stop_spent(sequences)
        while active:
            active = self.select(active)
            logits = self.optimise(active)
            tokens = self.resample(active, logits)
            self.propose(active, tokens)
            active = self.stop_spent(active)

    # 1
    def roll_out(self, sequences: Seq[Sequence], prefixes: Seq[tuple[int, ...]]) -> list[Trajectory]:
        """Continues each prefix (response tokens) to a complete, scored trajectory.

        All but the last token of a prefix belong to the current trajectory, whose latents are kept.
        """
        if not sequences:
            return []
        contexts = [s.context(prefix) for s, prefix in zip(sequences, prefixes, strict=True)]
        with self._phase("rollout", sequences):
            drawn = self.rollouts.rollout(contexts, self.config.rollout, self.stop)
        for sequence, new in zip(sequences, drawn, strict=True):
            sequence.stats.rollouts += 1
            sequence.stats.generated_tokens += len(new.tokens)
        tokens = [torch.cat([new.tokens.new_tensor(p), new.tokens]) for p, new in zip(prefixes, drawn, strict=True)]
        rewards = self._score(sequences, tokens)
        # Entropy and confidence of every position: criteria of the selection.
        with self.objective.clock.phase("selection", [s.stats for s in sequences]):
            return [self._trajectory(*parts) for parts in zip(sequences, drawn, tokens, rewards, strict=True)]

    # 2
    def select(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Commits everything before the next token worth optimising; returns the sequences that have one."""
        candidates = [
            Candidates(s.conversation, s.current.tokens, s.current.hard, s.current.uncertain, s.position)
            for s in sequences
        ]
        with self._phase("selection", sequences):
            positions = select(candidates, self.objective, self.config)
        for sequence, position in zip(sequences, positions, strict=True):
            sequence.stats.skipped_positions += position - sequence.position
            self._commit(sequence, position)
        return [sequence for sequence in sequences if not sequence.finished]

    # 3
    def optimise(self, sequences: Seq[Sequence]) -> Tensor:
        """DTO from the latents ahead; the optimised logits (B, V) of each sequence's next token."""
        if not sequences:
            return torch.empty(0)
        with self._phase("dto", sequences):
            results = dto.optimize_batch([self._problem(s) for s in sequences], self.objective)
        for sequence in sequences:
            sequence.stats.optimised_positions += 1
        return torch.cat([result.logits[:1] for result in results])

    # 4
    def resample(self, sequences: Seq[Sequence], logits: Tensor) -> list[int]:
        """Draws each sequence's next token anew, from the optimised logits."""
        if not sequences:
            return []
        contexts = [s.context(s.committed) for s in sequences]
        with self._phase("resample", sequences):
            tokens: list[int] = self.sampler(logits, self.config.resample, contexts).tolist()
        return tokens

    # 5
    def propose(self, sequences: Seq[Sequence], tokens: Seq[int]) -> None:
        """Commits a token that stayed the same; rolls out from one that did not, and keeps the better trajectory."""
        changed = [
            (s, token) for s, token in zip(sequences, tokens, strict=True) if token != int(s.current.tokens[s.position])
        ]
        proposals = self.roll_out([s for s, _ in changed], [(*s.committed, token) for s, token in changed])
        for (sequence, token), proposal in zip(changed, proposals, strict=True):
            self._accept_or_reject(sequence, token, proposal)
        for sequence in sequences:
            self._commit(sequence, sequence.position + 1)

    # 6
    def stop_spent(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Commits all that is ahead of sequences without rollouts left; returns those still to be decoded."""
        for sequence in sequences:
            if sequence.stats.rollouts >= self.config.max_rollouts:
                self._commit(sequence, len(sequence.current.tokens))
        return [sequence for sequence in sequences if not sequence.finished]

    def _accept_or_reject(self, sequence: Sequence, token: int, proposal: Trajectory) -> None:
        old = sequence.current
        accepted = not self.config.rejection_sampling or proposal.reward > old.reward
        sequence.stats.revisions.append(
            Revision(
                position=sequence.position,
                old_token=int(old.tokens[sequence.position]),
                new_token=token,
                old_reward=old.reward,
                new_reward=proposal.reward,
                accepted=accepted,
            )
        )
        if accepted:
            sequence.trajectory = proposal
        else:
            sequence.stats.rejections += 1

    def _commit(self, sequence: Sequence, position: int) -> None:
        tokens = sequence.current.tokens
        if position > sequence.position and self.observer is not None:
            self.observer.on_commit(sequence.index, tokens[sequence.position : position].tolist(), len(tokens))
        sequence.position = position
        if sequence.finished:
            sequence.conversation.release()

    def _score(self, sequences: Seq[Sequence], tokens: Seq[Tensor]) -> list[float]:
        self._announce("reward", sequences)
        return self.objective.rewards([s.conversation for s in sequences], tokens)

    def _trajectory(self, sequence: Sequence, new: Rollout, tokens: Tensor, reward: float) -> Trajectory:
        """A rollout behind what it shares with the current trajectory: the rows up to where it starts."""
        config, head = self.config, self.objective.tables.head
        thresholds = (config.entropy_threshold, config.confidence_threshold)
        stats = ops.linear_relaxed_stats(new.latents, head, 1.0, *thresholds, config.backend)
        kept = len(tokens) - len(new.tokens)
        latents, hard, uncertain = new.latents, stats.token, stats.mask
        if config.gumbel_noise and len(latents):
            hard = dto.start_tokens(latents, True, sequence.seed, kept, head, config)
        if kept:
            old = sequence.current
            latents = torch.cat([old.latents[:kept], latents])
            hard = torch.cat([old.hard[:kept], hard])
            uncertain = torch.cat([old.uncertain[:kept], uncertain])
        return Trajectory(tokens, latents, tokens if config.anchor == "rollout" else hard, uncertain, reward)

    def _problem(self, sequence: Sequence) -> dto.Problem:
        """What DTO starts from at the sequence's position: the rows that move, and the hard tokens of all."""
        trajectory, t = sequence.current, sequence.position
        rows = trajectory.latents[t:] if self.config.update_postfix else trajectory.latents[t : t + 1]
        start = rows if self.config.parameterization == "latents" else self.objective.language_model.logits(rows)
        return dto.Problem(
            sequence.conversation,
            trajectory.tokens[:t],
            start,
            sequence.seed,
            tokens=trajectory.hard[t:],
            rollout=trajectory.tokens[t:],
        )

    def _phase(self, name: str, sequences: Seq[Sequence]) -> AbstractContextManager[None]:
        self._announce(name, sequences)
        return self.objective.clock.phase(name, [s.stats for s in sequences])

    def _announce(self, phase: str, sequences: Seq[Sequence]) -> None:
        if self.observer is not None:
            self.observer.on_phase(phase, len(sequences))
