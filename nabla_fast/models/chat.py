"""Chats as a language model and a reward model see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Chat = Sequence[Message]

# Stands in for the response while a template is rendered. Letters only, so that no template trims or escapes it.
_RESPONSE_MARK = "NablaFastResponseMark"


@dataclass(frozen=True)
class ConversationFrame:
    """What a chat template puts around the assistant's response.

    Attributes:
        opening: token ids from the start of the conversation up to the response.
        closing: token ids that the template writes after the response (end-of-turn and what follows).
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]


def as_chats(prompts: object) -> list[Chat]:
    """Normalises a string, a chat (list of messages) or a list of either to a list of chats.

    A string becomes one user message.

    Raises:
        ValueError: if ``prompts`` is empty, or a prompt holds no text.
        TypeError: if ``prompts`` is anything else.
    """
    if isinstance(prompts, str) or _is_chat(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a string, a chat or a list of either, got {type(prompts).__name__}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one string or chat")
    return [_as_chat(prompt, index) for index, prompt in enumerate(prompts)]


def generation_prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """Token ids of ``chat`` with the template's generation prompt, ready for the language model to continue."""
    require_chat_template(tokenizer, "tokenizer")
    text = tokenizer.apply_chat_template([dict(m) for m in chat], tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


def conversation_frame(tokenizer: Any, chat: Chat) -> ConversationFrame:
    """What the template of ``tokenizer`` writes before and after a response to ``chat``.

    The chat is rendered once with a mark in the response's place and cut there, so the result is the template's own
    text also where a finished assistant turn is written differently from the generation prompt.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template does not write the response verbatim.
    """
    require_chat_template(tokenizer, "reward_tokenizer")
    messages = [*(dict(m) for m in chat), {"role": "assistant", "content": _RESPONSE_MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    opening, mark, closing = text.rpartition(_RESPONSE_MARK)
    if not mark:
        raise ValueError(
            "reward_tokenizer has a chat template that does not write the assistant's message as given, so the "
            "response has no place in it; give a tokenizer whose template does"
        )
    return ConversationFrame(tuple(encode(tokenizer, opening)), tuple(encode(tokenizer, closing)))


def require_chat_template(tokenizer: Any, argument: str) -> None:
    """Raises ValueError, naming ``argument``, if ``tokenizer`` has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{argument} ({type(tokenizer).__name__}) has no chat template; give an instruct model's tokenizer or set "
            f"{argument}.chat_template"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` alone."""
    # A template writes its own special tokens (a BOS among them), so the tokenizer must not add more.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _as_chat(prompt: object, index: int) -> Chat:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not _is_chat(prompt):
        raise TypeError(
            f"prompts[{index}] must be a string or a non-empty list of messages, got {type(prompt).__name__}"
            if not isinstance(prompt, Sequence) or prompt
            else f"prompts[{index}] is an empty chat; give at least one message"
        )
    for message in prompt:  # type: ignore[attr-defined]
        if "role" not in message or "content" not in message:
            raise ValueError(f"prompts[{index}] has a message without 'role' or 'content': {dict(message)!r}")
    last = prompt[-1]  # type: ignore[index]
    if not (isinstance(last["content"], str) and last["content"].strip()):
        raise ValueError(f"prompts[{index}] is empty; the last message must hold text, got {last['content']!r}")
    return prompt  # type: ignore[return-value]
