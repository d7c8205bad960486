"""What a rollout back end is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.models.body import State
from nabla_fast.models.tracks import Track
from nabla_fast.sampling import Context


class RolloutError(RuntimeError):
    """A back end cannot give the rollouts it was asked for: its server died, or is not one for this language model.

    Attributes:
        committed: of each sequence of the decode that it ended, the committed tokens.
        responses: and the best complete response so far, which begins with them; empty before the first rollout.
    """

    committed: tuple[tuple[int, ...], ...] = ()
    responses: tuple[tuple[int, ...], ...] = ()


class ServerLostError(RolloutError):
    """A server does not answer any more, whatever it is asked."""


@dataclass(frozen=True)
class Start:
    """Where a rollout begins.

    Attributes:
        context: prompt and response so far.
        track: what the language model has computed of this sequence; read, never changed. None for nothing.
        earlier: responses drawn for this sequence before, the one whose place the rollout may take first. They change
            how fast it is, never what it gives.
    """

    context: Context
    track: Track | None = None
    earlier: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """A continuation.

    Attributes:
        tokens: (k,) int64 new tokens, on the CPU; none if the sequence had already ended.
        latents: (k, d) the hidden state that predicted each.
        state: the language model's state of prompt and response without the last token, or of less of it, where the
            back end has one.
        calls: forward passes of the language model in which the sequence took part.
        drafted, accepted: draft tokens that those passes verified, and how many proved right.
    """

    tokens: Tensor
    latents: Tensor
    state: State | None = None
    calls: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class StopRule:
    """When a response has ended, besides at its limit.

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

    def ended(self, context: Context) -> bool:
        """Whether the response is complete."""
        return self.finish_reason(context) is not None

    def finish_reason(self, context: Context) -> str | None:
        """Why the response is complete, as vLLM says it; None if it is not.

        Returns:
            "stop" if it ends with an end token, with a stop string or by a criterion; else "length" if it is as long
            as it may be.
        """
        response = context.response
        if not response:
            return None
        if response[-1] in self.eos_token_ids or (self.stop_strings and self._completes_stop_string(response)):
            return "stop"
        if any(criterion([*context.prompt_ids, *response]) for criterion in self.criteria):
            return "stop"
        return "length" if len(response) >= context.limit else None

    def _completes_stop_string(self, response: Sequence[int]) -> bool:
        # A stop string of n bytes lies within the last n tokens, since a token that is part of it adds a byte or more;
        # earlier ones would have ended the response before. Spare tokens absorb a character cut at the window's start.
        window = max(len(stop.encode()) for stop in self.stop_strings) + 4
        text = self.tokenizer.decode(list(response[-window:]))
        return any(stop in text for stop in self.stop_strings)


class RolloutStream(Protocol):
    """Rollouts under way, all drawn by one sampling and one stop rule."""

    def submit(self, key: int, start: Start) -> None:
        """Begins a rollout that `collect` will give back as ``key``."""

    def collect(self) -> list[tuple[int, Rollout]]:
        """Waits until a rollout has ended; those that have, with their keys, or nothing if none is under way.

        A rollout's tokens depend on its context alone, not on the others.

        Raises:
            FloatingPointError: if the model gives NaN or infinite logits.
            RolloutError: if a rollout under way has no answer to be had any more; what had ended is not given back.
        """
        ...

    def close(self) -> None:
        """Gives up what is under way."""


class RolloutBackend(Protocol):
    """Draws trajectories."""

    def open(self, sampling: Sampling, stop: StopRule) -> RolloutStream:
        """Where rollouts can be submitted one by one, while others are under way."""
        ...


def rollout(backend: RolloutBackend, starts: Sequence[Start], sampling: Sampling, stop: StopRule) -> list[Rollout]:
    """Continues every sequence until it ends, together; in the order of ``starts``."""
    with closing(backend.open(sampling, stop)) as stream:
        for key, start in enumerate(starts):
            stream.submit(key, start)
        ended: dict[int, Rollout] = {}
        while len(ended) < len(starts):
            ended.update(stream.collect())
    return [ended[key] for key in range(len(starts))]
