"""The interface of rollout back ends."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.models.backbone import Cache
from nabla_fast.sequence import Sequence


class RolloutError(RuntimeError):
    """A back end cannot draw rollouts: its server is lost, or serves another model.

    Attributes:
        committed: of each sequence of the decode that it ended, the committed tokens.
        responses: and the best complete response so far, which begins with them; empty before the first rollout.
    """

    committed: tuple[tuple[int, ...], ...] = ()
    responses: tuple[tuple[int, ...], ...] = ()


class ServerLostError(RolloutError):
    """A server no longer answers."""


@dataclass(frozen=True)
class Rollout:
    """A continuation of a sequence's prefix.

    Attributes:
        tokens: (k,) int64 new tokens, on the CPU; none if the response had already ended.
        latents: (k, d) the hidden state that predicted each.
        cache: the language model's, of prompt and response without the last token, or of less of it. None where the
            back end has none, or the sequence keeps none.
        calls: forward passes of the language model in which the sequence took part.
        drafted, accepted: draft tokens that those passes verified, and how many proved right.
    """

    tokens: Tensor
    latents: Tensor
    cache: Cache | None = None
    calls: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class StopRule:
    """When a response ends, apart from its limit.

    Attributes:
        eos_token_ids: end tokens.
        stop_strings: the response ends with the token that completes one of these.
        tokenizer: decodes tokens for the stop strings.
        criteria: further criteria over the ids (prompt and response) of one sequence.
    """

    eos_token_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    criteria: tuple[Callable[[list[int]], bool], ...] = ()

    def ended(self, sequence: Sequence, response: tuple[int, ...]) -> bool:
        """Whether a response to the sequence's prompt is complete."""
        if not response:
            return False
        if len(response) >= sequence.limit or self._stopped(response):
            return True
        return any(criterion([*sequence.prompt_ids, *response]) for criterion in self.criteria)

    def finish_reason(self, sequence: Sequence, response: tuple[int, ...]) -> str:
        """Why a complete response ended, in vLLM's words; criteria, which may count their calls, are not asked again.

        Returns:
            "length" if it is as long as it may be and ends with no end token or stop string, else "stop".
        """
        return "length" if len(response) >= sequence.limit and not self._stopped(response) else "stop"

    def _stopped(self, response: tuple[int, ...]) -> bool:
        ended = response[-1] in self.eos_token_ids
        if ended or not self.stop_strings:
            return ended
        # A stop string of n bytes lies within the last n tokens, since a token that is part of it adds a byte or more;
        # earlier ones would have ended the response before. Spare tokens absorb a character cut at the window's start.
        window = max(len(stop.encode()) for stop in self.stop_strings) + 4
        text = self.tokenizer.decode(list(response[-window:]))
        return any(stop in text for stop in self.stop_strings)


class RolloutStream(Protocol):
    """Running rollouts that share sampling settings and stop rule."""

    def submit(self, sequence: Sequence) -> None:
        """Begins a rollout that continues ``sequence.prefix``; the sequence's caches are read and never changed."""

    def collect(self, passes: int | None = None) -> list[tuple[Sequence, Rollout]]:
        """Waits until a rollout has ended; those that have, with their sequences, or nothing if none is under way.

        A rollout's tokens depend on prompt, prefix, seed and limit of its sequence alone, not on the others.

        Args:
            passes: gives back nothing if no rollout has ended after so many forward passes, so that others can be
                submitted or dropped meanwhile. A back end that does not count them waits for a moment, or to the end
                of a rollout.

        Raises:
            FloatingPointError: if the model gives NaN or infinite logits.
            RolloutError: if a rollout under way has no answer to be had any more; what had ended is not given back.
        """
        ...

    def drop(self, sequence: Sequence) -> None:
        """Cancels the rollout of a sequence that was submitted, and whose rollout was not given back yet."""

    def close(self) -> None:
        """Cancels the running rollouts."""


class RolloutBackend(Protocol):
    """Draws trajectories."""

    def open(self, sampling: Sampling, stop: StopRule) -> RolloutStream:
        """Where rollouts can be submitted one by one, while others are under way."""
        ...


def rollout(backend: RolloutBackend, sequences: Seq[Sequence], sampling: Sampling, stop: StopRule) -> list[Rollout]:
    """Continues the prefix of every sequence until the response ends, all together; in their order."""
    with closing(backend.open(sampling, stop)) as stream:
        for sequence in sequences:
            stream.submit(sequence)
        ended: dict[Sequence, Rollout] = {}
        while len(ended) < len(sequences):
            ended.update(stream.collect())
    return [ended[sequence] for sequence in sequences]


def no_rollout(weight: Tensor) -> Rollout:
    """The rollout of a response that had already ended; ``weight`` is that of the output head (V, d)."""
    return Rollout(torch.empty(0, dtype=torch.long), weight.new_zeros(0, weight.shape[1]))


def unreadable(name: str, position: int, what: str = "logits") -> FloatingPointError:
    """The error of a model that gives NaN or infinite logits for the token at a position of the response."""
    return FloatingPointError(
        f"{name} returned NaN or infinite {what} at response position {position}; nothing of this rollout was committed"
    )
