"""What a rollout back end is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.sampling import Context


@dataclass(frozen=True)
class Rollout:
    """A continuation.

    Attributes:
        tokens: (k,) int64 new tokens, none if the sequence had already ended.
        latents: (k, d) the hidden state that predicted each.
    """

    tokens: Tensor
    latents: Tensor


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
        response = context.response
        if not response:
            return False
        if len(response) >= context.limit or response[-1] in self.eos_token_ids:
            return True
        if self.stop_strings and self._completes_stop_string(response):
            return True
        return any(criterion([*context.prompt_ids, *response]) for criterion in self.criteria)

    def _completes_stop_string(self, response: Sequence[int]) -> bool:
        # A stop string of n bytes lies within the last n tokens, since a token that is part of it adds a byte or more;
        # earlier ones would have ended the response before. Spare tokens absorb a character cut at the window's start.
        window = max(len(stop.encode()) for stop in self.stop_strings) + 4
        text = self.tokenizer.decode(list(response[-window:]))
        return any(stop in text for stop in self.stop_strings)


class RolloutBackend(Protocol):
    """Draws trajectories."""

    def rollout(self, contexts: Sequence[Context], sampling: Sampling, stop: StopRule) -> list[Rollout]:
        """Continues every sequence until it ends; its tokens depend on its context alone, not on the batch."""
        ...
