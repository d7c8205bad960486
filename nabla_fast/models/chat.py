"""Chats as token ids of the language model and of the reward model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = Mapping[str, Any]
Chat = Sequence[Message]

# Stands in for the response while a template is rendered. Letters only, so that no template trims or escapes it.
_RESPONSE_MARK = "NablaFastResponseMark"
# The rest of an empty thought that is open already.
_WHOLE_THOUGHT = "\n</think>\n\n"


class ChatTemplateError(ValueError):
    """A tokenizer's chat template does not take a chat."""


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
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a string, a chat or a list of either, got {type(prompts).__name__}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one string or chat")
    return [_as_chat(prompt, index) for index, prompt in enumerate(prompts)]


def generation_prompt_ids(tokenizer: Any, chat: Chat, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of ``chat`` with the template's generation prompt, ready for the language model to continue.

    A chat that ends with an assistant's message is continued there, as with transformers' ``continue_final_message``.

    Raises:
        ValueError: if the tokenizer has no chat template, or (`ChatTemplateError`) it does not take the chat.
    """
    template = _Template(tokenizer, template_kwargs, "tokenizer")
    if chat[-1]["role"] != "assistant":
        return encode(tokenizer, template.render(chat, add_generation_prompt=True))
    # Behind a whole thought, so that one that is only begun is not taken for the answer.
    thought = _WHOLE_THOUGHT if _open_thought(chat[-1]["content"]) else ""
    cut = template.around(chat, thought=thought) or template.around(chat)
    if cut is None:
        raise ChatTemplateError(
            "tokenizer has a chat template that does not write the assistant's last message as given, so it cannot be "
            "continued; leave that message out"
        )
    return encode(tokenizer, cut[0])


def conversation_frame(
    tokenizer: Any,
    chat: Chat,
    template_kwargs: Mapping[str, Any] | None = None,
    language_tokenizer: Any = None,
) -> ConversationFrame:
    """What the template of ``tokenizer`` writes before and after a response to ``chat``.

    The chat is rendered with a mark in the response's place and cut there, so the result is the template's own text
    also where a finished assistant turn is written differently from the generation prompt. A template that moves
    thoughts to a place of their own, and writes an empty thought where there is none, would write one before a response
    that brings its own. So the mark stands behind an empty thought in the form in which the language model writes it,
    where it is the language model that writes it, and the cut is made before both.

    Args:
        template_kwargs: further arguments of the templates.
        language_tokenizer: its template says what the language model's response begins with; None is ``tokenizer``.

    Raises:
        ValueError: if the tokenizer has no chat template, or (`ChatTemplateError`) it does not take the chat or does
            not write the response verbatim.

    Warns:
        UserWarning: if the template would leave thoughts out; the response is shown with them.
    """
    template = _Template(tokenizer, template_kwargs, "reward_tokenizer")
    require_chat_template(tokenizer, template.argument)
    writer = tokenizer if language_tokenizer is None else language_tokenizer
    begun, thought = _response_start(_Template(writer, template_kwargs, "tokenizer"), chat)
    cut = template.around(chat, begun, thought)
    if cut is None and thought:
        warnings.warn(
            "the chat template of reward_tokenizer leaves the thoughts of an assistant's message out or writes them "
            "elsewhere; the reward model sees the response with its thoughts, as the language model wrote it",
            stacklevel=2,
        )
        cut = template.around(chat, begun)
    if cut is None:
        raise ChatTemplateError(
            "reward_tokenizer has a chat template that does not write the assistant's message as given, so the "
            "response has no place in it; give a tokenizer whose template does"
        )
    opening, closing = cut
    return ConversationFrame(tuple(encode(tokenizer, opening)), tuple(encode(tokenizer, closing)))


class _Template(NamedTuple):
    """A tokenizer's chat template and its further arguments; messages call the tokenizer ``argument``."""

    tokenizer: Any
    kwargs: Mapping[str, Any] | None
    argument: str

    def render(self, chat: Chat, **options: bool) -> str:
        require_chat_template(self.tokenizer, self.argument)
        try:
            messages = [dict(message) for message in chat]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **(self.kwargs or {})))
        except Exception as error:  # A template is a program of its own, and may end in any error.
            raise ChatTemplateError(
                f"{self.argument}'s chat template refuses the chat ({error or type(error).__name__})"
            ) from error

    def around(self, chat: Chat, begun: str = "", thought: str = "") -> tuple[str, str] | None:
        """What is written before and after a response, which is ``thought`` and the mark; None if it is not there.

        The response ends the assistant's turn, whose beginning is the last message, if that is the assistant's, and
        ``begun``.
        """
        own, last = begun + thought + _RESPONSE_MARK, chat[-1]
        if last["role"] == "assistant":
            finished = [*chat[:-1], {**last, "content": last["content"] + own}]
        else:
            finished = [*chat, {"role": "assistant", "content": own}]
        before, mark, after = self.render(finished).rpartition(thought + _RESPONSE_MARK)
        return (before, after) if mark else None


def _response_start(template: _Template, chat: Chat) -> tuple[str, str]:
    """How the language model's message begins, by its template.

    Returns:
        What its prompt has written of the message, apart from ``chat``'s own words: a thought it has opened. And the
        rest of an empty thought that the model is to write, "" where it is to write none.
    """
    if chat[-1]["role"] == "assistant":
        return "", _WHOLE_THOUGHT if _open_thought(chat[-1]["content"]) else ""
    if not getattr(template.tokenizer, "chat_template", None):
        return "", ""
    prompt = template.render(chat, add_generation_prompt=True)
    # At the very end: elsewhere it is the user's word.
    begun = re.search(r"<think>\s*\Z", prompt)
    if begun:
        return begun.group(), _WHOLE_THOUGHT
    cut = template.around(chat)
    if cut is None or not cut[0].startswith(prompt):
        return "", ""
    thought = cut[0][len(prompt) :]
    # Only what the template takes for the response's own, once it is there, is for the model to write.
    return "", thought if template.around(chat, begun=thought) == cut else ""


def _open_thought(text: str) -> bool:
    """Whether an assistant's ``text`` opens a thought that it does not close."""
    return text.rfind("<think>") > text.rfind("</think>")


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


def is_chat(prompt: object) -> bool:
    """Whether ``prompt`` is a list of messages, not empty."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _as_chat(prompt: object, index: int) -> Chat:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_chat(prompt):
        raise TypeError(
            f"prompts[{index}] must be a string or a non-empty list of messages, got {type(prompt).__name__}"
            if not isinstance(prompt, Sequence) or prompt
            else f"prompts[{index}] is an empty chat; give at least one message"
        )
    for message in prompt:  # type: ignore[attr-defined]
        if "role" not in message or "content" not in message:
            raise ValueError(f"prompts[{index}] has a message without 'role' or 'content': {dict(message)!r}")
        if not (message["content"] is None or isinstance(message["content"], str)):
            raise ValueError(
                f"prompts[{index}] has a message whose content is a {type(message['content']).__name__}; it must be "
                "text, since images and other parts are not supported"
            )
    last = prompt[-1]  # type: ignore[index]
    if not (last["content"] or "").strip():
        raise ValueError(f"prompts[{index}] is empty; the last message must hold text, got {last['content']!r}")
    return prompt  # type: ignore[return-value]
