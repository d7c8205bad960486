"""∇-Reasoner's decode loop (Alg. 1 and 3), over a batch of sequences.

The steps are numbered as in the design: 1 roll out, 2 select, 3 optimize, 4 resample, 5 propose and accept, 6 stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nabla_fast import dto, ops
from nabla_fast.comparison import is_higher
from nabla_fast.config import NablaConfig
from nabla_fast.objective import Objective
from nabla_fast.proposals import PROPOSALS, Proposer
from nabla_fast.rollout import Rollout, RolloutBackend, RolloutError, RolloutStream, StopRule
from nabla_fast.sampling import Sampler
from nabla_fast.selection import select
from nabla_fast.sequence import Sequence, Trajectory
from nabla_fast.stats import Revision


class Observer(Protocol):
    """Callbacks about the progress of a decode. Those that a subclass does not define do nothing."""

    def on_phase(self, phase: str, sequences: int) -> None:
        """A phase of `nabla_fast.stats.PHASES` begins for this number of sequences."""
        return

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        """Sequence ``index`` has committed ``tokens`` of a response that is ``length`` tokens long as it stands."""
        return


@dataclass(eq=False)
class Decoder:
    """Decodes sequences with one pair of models.

    Attributes:
        objective: the models, their gradients, the clock.
        rollouts: where trajectories come from.
        sampler: draws the resampled token.
        stop: when a response has ended.
        observer: hears of progress; None for nobody.
        enough: asked before each token that a sequence would try; True ends the sequence as having no rollouts left.
    """

    objective: Objective
    rollouts: RolloutBackend
    sampler: Sampler
    stop: StopRule
    observer: Observer | None = None
    enough: Callable[[Sequence], bool] | None = None

    @property
    def config(self) -> NablaConfig:
        return self.objective.config

    def decode(self, sequences: Seq[Sequence]) -> None:
        """Runs every sequence to its end; the results are in the sequences. Raises what `finishing` raises."""
        for _ in self.finishing(sequences):
            pass

    @torch.no_grad()
    def finishing(self, sequences: Seq[Sequence]) -> Generator[Sequence, None, None]:
        """Runs all sequences, and yields each one when its response is complete.

        A sequence goes on as soon as its own rollout has ended, and the next one begins when one has finished.

        Raises:
            RolloutError: if rollouts cannot be had any more; with what every sequence has come to.
        """
        waiting = deque(sequences)
        try:
            with closing(Batch(self)) as batch:
                while waiting or batch.rolling:
                    while waiting and len(batch.rolling) < self.config.max_batch_size:
                        batch.add(waiting.popleft())
                    under_way = batch.receive()
                    while batch.arrived:
                        batch.advance()
                    yield from (sequence for sequence in under_way if sequence.finished)
        except RolloutError as error:
            error.committed = tuple(s.committed if s.trajectory else () for s in sequences)
            error.responses = tuple(tuple(s.current.tokens.tolist()) if s.trajectory else () for s in sequences)
            raise

    # 1
    def roll_out(self, sequence: Sequence, prefix: tuple[int, ...], stream: RolloutStream) -> None:
        """Begins a rollout that continues a prefix (response tokens).

        All but its last token belong to the current trajectory, whose latents are kept.
        """
        sequence.prefix = prefix
        self._announce("rollout", [sequence])
        self.objective.language_cache(sequence)  # so that the rollout's is kept
        stream.submit(sequence)

    def collect(
        self, rolling: set[Sequence], stream: RolloutStream, passes: int | None = None
    ) -> list[tuple[Sequence, Rollout]]:
        """Waits for rollouts to end, and takes their sequences out of ``rolling``.

        Args:
            passes: see `RolloutStream.collect`.
        """
        with self.objective.clock.phase("rollout", [s.stats for s in rolling]):
            ended = stream.collect() if passes is None else stream.collect(passes)
        for sequence, _ in ended:
            rolling.remove(sequence)  # KeyError if a back end gives back what it was not asked for
        return ended

    def accept(self, ended: Seq[tuple[Sequence, Rollout]]) -> list[Sequence]:
        """Scores rollouts that have ended, and accepts or rejects them; returns their sequences."""
        if not ended:
            return []
        sequences, drawn = [s for s, _ in ended], [rollout for _, rollout in ended]
        for sequence, new in ended:
            sequence.stats.rollouts += 1
            sequence.stats.generated_tokens += len(new.tokens)
            sequence.stats.rollout_calls += new.calls
            sequence.stats.drafted_tokens += new.drafted
            sequence.stats.accepted_draft_tokens += new.accepted
        tokens = [torch.cat([r.tokens.new_tensor(s.prefix), r.tokens]) for s, r in zip(sequences, drawn, strict=True)]
        self._announce("reward", sequences)
        rewards = self.objective.rewards(sequences, tokens)
        # Entropy and confidence of every position: criteria of the selection.
        with self.objective.clock.phase("selection", [s.stats for s in sequences]):
            trajectories = [self._trajectory(*parts) for parts in zip(sequences, drawn, tokens, rewards, strict=True)]
        for sequence, trajectory, rollout in zip(sequences, trajectories, drawn, strict=True):
            accepted = sequence.trajectory is None or self._replaces(sequence, trajectory)
            sequence.drawn.insert(0 if accepted else 1, tuple(trajectory.tokens.tolist()))
            if accepted:
                sequence.trajectory = trajectory
                self.objective.language_cache(sequence).keep(trajectory.tokens[:-1], rollout.cache)
            # Of a proposal, the token it began with is decided.
            self._commit(sequence, len(sequence.prefix))
        return sequences

    # 2
    def select(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Commits everything before the next token worth optimizing; returns the sequences that have one."""
        with self._phase("selection", sequences):
            positions = select(sequences, self.objective, self.config)
        for sequence, position in zip(sequences, positions, strict=True):
            sequence.stats.skipped_positions += position - sequence.position
            self._commit(sequence, position)
        return [sequence for sequence in sequences if not sequence.finished]

    # 3 and 4
    def next_tokens(self, sequences: Seq[Sequence]) -> list[int]:
        """The token that each sequence tries at its position: by DTO and a draw from its logits, or as configured."""
        for sequence in sequences:
            sequence.stats.optimised_positions += 1
            sequence.stats.optimised.append(sequence.position)
        return PROPOSALS[self.config.proposal](sequences, Proposer(self.objective, self.sampler, self._phase))

    # 5
    def propose(
        self, sequences: Seq[Sequence], tokens: Seq[int], stream: RolloutStream
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Begins rollouts from tokens that changed, and commits those that did not; returns both kinds of sequences."""
        changed, same = [], []
        for sequence, token in zip(sequences, tokens, strict=True):
            if token != int(sequence.current.tokens[sequence.position]):
                self.roll_out(sequence, (*sequence.committed, token), stream)
                changed.append(sequence)
            else:
                self._commit(sequence, sequence.position + 1)
                same.append(sequence)
        return changed, same

    # 6
    def stop_spent(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Commits all tokens ahead where no rollouts are left; returns the sequences still to be decoded."""
        for sequence in sequences:
            spent = self.enough is not None and self.enough(sequence)
            if spent or sequence.stats.rollouts >= self.config.most_rollouts:
                self._commit(sequence, len(sequence.current.tokens))
        return [sequence for sequence in sequences if not sequence.finished]

    def _replaces(self, sequence: Sequence, proposal: Trajectory) -> bool:
        """Whether a proposal replaces the current trajectory, as it does if its reward is higher."""
        old = sequence.current
        accepted = not self.config.rejection_sampling or is_higher(proposal.reward, old.reward)
        sequence.stats.rejections += not accepted
        sequence.stats.revisions.append(
            Revision(
                position=sequence.position,
                old_token=int(old.tokens[sequence.position]),
                new_token=sequence.prefix[-1],
                old_reward=old.reward,
                new_reward=proposal.reward,
                accepted=accepted,
            )
        )
        return accepted

    def _commit(self, sequence: Sequence, position: int) -> None:
        tokens = sequence.current.tokens
        if position > sequence.position and self.observer is not None:
            self.observer.on_commit(sequence.index, tokens[sequence.position : position].tolist(), len(tokens))
        sequence.position = position
        if sequence.finished:
            sequence.stats.finish_reason = self.stop.finish_reason(sequence, sequence.committed)
            sequence.release()

    def _trajectory(self, sequence: Sequence, new: Rollout, tokens: Tensor, reward: float) -> Trajectory:
        """The trajectory of a rollout: the current one's rows up to where the rollout starts, then its own."""
        config, head = self.config, self.objective.tables.head
        thresholds = (config.entropy_threshold, config.confidence_threshold)
        stats = ops.linear_relaxed_stats(new.latents, head, 1.0, *thresholds, config.backend)
        kept = len(tokens) - len(new.tokens)
        latents, hard, uncertain = new.latents, tokens, stats.mask
        if config.anchor == "argmax":
            noisy = config.gumbel_noise and len(latents)
            drawn = dto.start_tokens(latents, True, sequence.seed, kept, head, config) if noisy else stats.token
            hard = torch.cat([tokens[:kept], drawn.cpu()])  # what is kept is committed
        if kept:
            old = sequence.current
            latents = torch.cat([old.latents[:kept], latents])
            uncertain = torch.cat([old.uncertain[:kept], uncertain])
        return Trajectory(tokens, latents, hard, uncertain, reward)

    def _phase(self, name: str, sequences: Seq[Sequence]) -> AbstractContextManager[None]:
        self._announce(name, sequences)
        return self.objective.clock.phase(name, [s.stats for s in sequences])

    def _announce(self, phase: str, sequences: Seq[Sequence]) -> None:
        if self.observer is not None:
            self.observer.on_phase(phase, len(sequences))


class Batch:
    """Sequences that one decoder has under way. Others join them, and some are dropped, between two steps.

    A sequence's tokens depend on itself alone, whoever is beside it. As long as ``arrived`` holds any, `advance` is
    due, else `receive`; `Sequence.finished` says which have come to their end.

    Attributes:
        decoder: whose settings they share.
        rolling: those whose rollout is under way.
        arrived: those whose rollout has ended, and that have not proposed another one yet.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.rolling: set[Sequence] = set()
        self.arrived: list[Sequence] = []
        self._stream = decoder.rollouts.open(decoder.config.rollout, decoder.stop)

    def add(self, sequence: Sequence) -> None:
        """Begins the first rollout of a sequence."""
        self.rolling.add(sequence)
        self.decoder.roll_out(sequence, (), self._stream)

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its caches."""
        if sequence in self.rolling:
            self.rolling.remove(sequence)
            self._stream.drop(sequence)
        self.arrived = [other for other in self.arrived if other is not sequence]
        sequence.release()

    @torch.no_grad()
    def receive(self, passes: int | None = None) -> list[Sequence]:
        """Waits for rollouts to end, or for some ``passes``; their sequences are ``arrived`` afterwards."""
        self.arrived = self.decoder.accept(self.decoder.collect(self.rolling, self._stream, passes))
        return list(self.arrived)

    @torch.no_grad()
    def advance(self) -> None:
        """Takes those that have arrived to their next token worth optimizing, and past it or to another rollout."""
        arrived = self.decoder.stop_spent(self.arrived)
        arrived = self.decoder.select(arrived) if arrived else []
        tokens = self.decoder.next_tokens(arrived) if arrived else []
        changed, self.arrived = self.decoder.propose(arrived, tokens, self._stream)
        self.rolling.update(changed)

    def close(self) -> None:
        """Cancels the rollouts that are under way."""
        self._stream.close()
