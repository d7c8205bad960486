"""What passes between the routes and the engine: what is asked, what happens, and what goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.models.chat import Chat
from nabla_fast.stats import SequenceStats

Prompt = Chat | str | tuple[int, ...]
"""A chat for the template, text without one, or token ids."""


@dataclass(eq=False)
class RequestError(Exception):
    """A request that is not answered, in the words of OpenAI's API.

    Attributes:
        message: one sentence for the client.
        param: the field that is meant, where one is.
        code: for programs, where OpenAI or vLLM has one.
        status: of the HTTP response.
        headers: of the response.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # JSON may name fields by half surrogates, which no encoding has.
        return {
            "error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in told.items()}
        }


@dataclass(frozen=True)
class Ask:
    """What a request has decoded: ``n`` answers to each of its prompts.

    Attributes:
        prompts: all chats, or none.
        config: settings, seed and length among them.
        n: answers to each prompt.
        samples: answers that are drawn for each of these, of which the one with the highest reward is taken.
        stream: whether text is told as its tokens are committed.
    """

    prompts: tuple[Prompt, ...]
    config: NablaConfig
    n: int = 1
    samples: int = 1
    stream: bool = False

    @property
    def choices(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class Accepted:
    """The prompts have been read, and wait or are decoded; they have ``prompt_tokens`` together."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """More text of an answer, of which no part will change any more."""

    choice: int
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer is complete.

    Attributes:
        choice: its place: that of the prompt, times ``n``, and its own.
        text: all of it, special tokens left out.
        tokens: how many.
        stats: what it took, all samples together.
    """

    choice: int
    text: str
    tokens: int
    reward: float
    finish_reason: str
    stats: SequenceStats


Event = Accepted | Delta | Answer | RequestError
"""After an error, no more answers will come."""
