"""The interface between the vLLM back end and a vLLM server or in-process engine."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from nabla_fast.config import Sampling
from nabla_fast.rollout.base import StopRule
from nabla_fast.sequence import Sequence


@dataclass(frozen=True)
class TokenRequest:
    """One completion: token ids in, token ids out.

    Attributes:
        prompt_ids: what is to be continued, not empty.
        parameters: named as in vLLM's ``SamplingParams`` and in its ``/v1/completions``. Stop strings and end tokens
            stay in the answer.
    """

    prompt_ids: tuple[int, ...]
    parameters: dict[str, Any]

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        response: tuple[int, ...],
        sampling: Sampling,
        stop: StopRule,
        repetition_penalty: float = 1.0,
    ) -> TokenRequest:
        """Continues ``response`` up to the sequence's limit; the seed depends on (sequence seed, position) alone.

        All parameters that change the distribution are named, since a server puts the model's own defaults in place of
        others. The repetition penalty is on the logits of all tokens of prompt and answer, before anything else, as
        transformers has it. Penalties that count a token's occurrences in the answer have no place here: an answer that
        is continued is part of the prompt.
        """
        key = f"{sequence.seed}:{len(response)}".encode()
        parameters = {
            "max_tokens": sequence.limit - len(response),
            # vLLM takes a signed 64-bit number.
            "seed": int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": 0.0,
            "min_tokens": 0,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(stop.stop_strings),
            "stop_token_ids": sorted(stop.eos_token_ids),
            "include_stop_str_in_output": True,
            # Which tokens end a response is for the stop rule to say, and it reads special tokens as text, too.
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        return cls((*sequence.prompt_ids, *response), parameters)


@dataclass(frozen=True)
class Completion:
    """The answer to a `TokenRequest`.

    Attributes:
        tokens: new token ids, the end token or those of the stop string included.
        finish_reason: "stop" or "length", in vLLM's words.
    """

    tokens: tuple[int, ...]
    finish_reason: str


class Requests(Protocol):
    """Running requests."""

    def send(self, key: int, request: TokenRequest) -> None:
        """Begins a request that `wait` will give back as ``key``."""

    def wait(self, seconds: float | None = None) -> list[tuple[int, Completion]]:
        """Waits until a request is answered, of which there must be one under way; all that are, with their keys.

        Args:
            seconds: gives back nothing if none is answered by then; None waits as long as it takes.

        Raises:
            RolloutError: if one will have no answer.
        """
        ...

    def close(self) -> None:
        """Cancels the running requests."""


class Engine(Protocol):
    """A running vLLM.

    Attributes:
        name: what errors call it, with the argument that chose it.
        model: the model it serves.
        context_length: most tokens of prompt and answer together.
    """

    name: str
    model: str
    context_length: int

    def open(self) -> Requests: ...

    def log_probabilities(self, token_ids: Seq[int]) -> list[float]:
        """Of each token but the first, given those before it.

        Raises:
            RolloutError: if there is no answer, or a token that the model does not have.
        """
        ...
