"""Answers in OpenAI's form, whole or as chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from nabla_fast import __version__
from nabla_fast.server.asks import Answer, Delta
from nabla_fast.server.protocol import Request
from nabla_fast.stats import Stats

_COUNTERS = (
    *("rollouts", "rejections", "gradient_evaluations", "model_calls", "reward_calls", "generated_tokens"),
    *("cache_hits", "cache_misses"),
)
DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


class Reply:
    """Writes the answers to one request, whose prompts have ``prompt_tokens`` together."""

    def __init__(self, request: Request, prompt_tokens: int) -> None:
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid4().hex}",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"nabla_fast-{__version__}",
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of a response with all answers, in the order of their choices."""
        ordered = sorted(answers, key=lambda answer: answer.choice)
        choices = [self._choice(a.choice, a.finish_reason, self._message(a.text)) for a in ordered]
        return {**self._head, "choices": choices, "usage": self._usage(ordered)}

    def first(self) -> Iterator[bytes]:
        """The events that a stream begins with."""
        if self._request.chat:
            for choice in range(self._request.ask.choices):
                yield self._event(self._choice(choice, None, {"delta": {"role": "assistant", "content": ""}}))

    def piece(self, event: Delta | Answer) -> bytes:
        """The event of more text, or of an answer's end."""
        text, reason = (event.text, None) if isinstance(event, Delta) else ("", event.finish_reason)
        content = {"delta": {"content": text} if text else {}} if self._request.chat else {"text": text}
        return self._event(self._choice(event.choice, reason, content))

    def last(self, answers: Sequence[Answer]) -> Iterator[bytes]:
        """The events behind the last answer."""
        if self._request.include_usage:
            usage = self._usage(sorted(answers, key=lambda answer: answer.choice))
            yield sse({**self._stream_head, "choices": [], "usage": usage})
        yield DONE

    @property
    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._request.chat else "text_completion"}

    def _event(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._request.include_usage else {}
        return sse({**self._stream_head, "choices": [choice], **usage})

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}

    @staticmethod
    def _choice(index: int, reason: str | None, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        completion = sum(answer.tokens for answer in answers)
        counters = Stats([answer.stats for answer in answers]).totals.counters()
        rewards = [answer.reward for answer in answers]
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "nabla": {
                "reward": max(rewards),
                "rewards": rewards,
                "seed": self._request.ask.config.seed,
                **{name: counters[name] for name in _COUNTERS},
            },
        }


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()
