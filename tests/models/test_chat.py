"""Chats as given, and what a template writes around a response."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from nabla_fast.models.chat import as_chats, conversation_frame, generation_prompt_ids
from nabla_fast.testing.models import CHAT_TEMPLATE, CLOSING, MESSAGES, prompt_ids, tiny_tokenizer

USER = {"role": "user", "content": "what is 3 times 4"}
ASSISTANT = {"role": "assistant", "content": "12"}

DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|start|>system\non<|end|>\n{% endif %}" + CHAT_TEMPLATE
# As Qwen3 does: a finished turn has an empty thought that the generation prompt does not have.
THOUGHT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}= =\n\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TRIMMED = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
NOTHING_AFTER = CHAT_TEMPLATE.replace("<|end|>\n{% endfor %}", "{% endfor %}")
DROPPED = CHAT_TEMPLATE.replace("in messages %}", "in messages if m['role'] != 'assistant' %}")
SHORTENED = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'][:3] }}")
UPPER_CASE = CHAT_TEMPLATE.replace("m['content'] }}", "m['content'] | upper }}")


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        (CHAT_TEMPLATE, "<|start|>user\nwhat is 3 times 4<|end|>\n<|start|>assistant\n", CLOSING),
        (
            DEFAULT_SYSTEM,
            "<|start|>system\non<|end|>\n<|start|>user\nwhat is 3 times 4<|end|>\n<|start|>assistant\n",
            CLOSING,
        ),
        (THOUGHT, "<|start|>user\nwhat is 3 times 4<|end|>\n<|start|>assistant\n= =\n\n", CLOSING),
        (TRIMMED, "<|start|>user\nwhat is 3 times 4<|end|>\n<|start|>assistant\n", CLOSING),
        (NOTHING_AFTER, "<|start|>user\nwhat is 3 times 4<|start|>assistant\n", ""),
    ],
    ids=["plain", "default system prompt", "empty thought", "trimmed", "nothing after"],
)
def test_frame_is_what_the_template_writes_around_a_finished_turn(template: str, opening: str, closing: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    frame = conversation_frame(tokenizer, MESSAGES)
    assert frame.opening == encode(tokenizer, opening)
    assert frame.closing == encode(tokenizer, closing)
    assert tokenizer.unk_token_id not in (*frame.opening, *frame.closing)
    whole = tokenizer.apply_chat_template([*MESSAGES, ASSISTANT], return_dict=False)
    assert [*frame.opening, *encode(tokenizer, "12"), *frame.closing] == whole


def test_frame_of_a_long_chat_keeps_every_turn_and_leaves_the_chat_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    chat = [{"role": "system", "content": "on"}, USER, ASSISTANT, {"role": "user", "content": "is it"}]
    before = [dict(message) for message in chat]
    frame = conversation_frame(tokenizer, chat)
    assert chat == before
    assert list(frame.opening) == prompt_ids(tokenizer, chat)


@pytest.mark.parametrize("template", [DROPPED, SHORTENED, UPPER_CASE], ids=["dropped", "shortened", "upper case"])
def test_template_that_does_not_write_the_message_is_an_error_that_names_the_tokenizer(template: str) -> None:
    with pytest.raises(ValueError, match=r"^reward_tokenizer has a chat template that does not write"):
        conversation_frame(tiny_tokenizer(chat_template=template), MESSAGES)


@pytest.mark.parametrize("template", [None, ""])
def test_tokenizer_without_a_template_is_an_error_that_names_it(template: str | None) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match=r"^reward_tokenizer .* has no chat template"):
        conversation_frame(tokenizer, MESSAGES)
    with pytest.raises(ValueError, match=r"^tokenizer .* has no chat template"):
        generation_prompt_ids(tokenizer, MESSAGES)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_SYSTEM, THOUGHT], ids=["plain", "system", "thought"])
def test_generation_prompt_is_the_templates_own(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    assert generation_prompt_ids(tokenizer, MESSAGES) == prompt_ids(tokenizer)


def test_tokenizer_that_adds_tokens_by_itself_adds_none_to_a_template() -> None:
    tokenizer = tiny_tokenizer()
    expected = conversation_frame(tokenizer, MESSAGES), generation_prompt_ids(tokenizer, MESSAGES)
    start = ("<|start|>", tokenizer.convert_tokens_to_ids("<|start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    assert tokenizer("12")["input_ids"] != list(encode(tokenizer, "12"))
    assert (conversation_frame(tokenizer, MESSAGES), generation_prompt_ids(tokenizer, MESSAGES)) == expected


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hello", [[{"role": "user", "content": "hello"}]]),
        (["a", "b"], [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]),
        (("a",), [[{"role": "user", "content": "a"}]]),
        ([USER], [[USER]]),
        ((USER, ASSISTANT, USER), [[USER, ASSISTANT, USER]]),
        ([[USER], [USER, ASSISTANT, USER]], [[USER], [USER, ASSISTANT, USER]]),
        (["a", [USER]], [[{"role": "user", "content": "a"}], [USER]]),
        ([(USER,)], [[USER]]),
    ],
    ids=repr,
)
def test_every_kind_of_prompt_becomes_a_list_of_chats(prompts: Any, expected: Any) -> None:
    assert [list(chat) for chat in as_chats(prompts)] == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "^prompts is empty"),
        ((), "^prompts is empty"),
        ("", r"^prompts\[0\] is empty"),
        (" \n", r"^prompts\[0\] is empty"),
        (["a", ""], r"^prompts\[1\] is empty"),
        ([["a"]], r"^prompts\[0\]"),
        ([[]], r"^prompts\[0\] is an empty chat"),
        (["a", []], r"^prompts\[1\] is an empty chat"),
        ([{"role": "user"}], r"^prompts\[0\] has a message without"),
        ([[USER], [{"content": "a"}]], r"^prompts\[1\] has a message without"),
        ([{"role": "user", "content": ""}], r"^prompts\[0\] is empty"),
        ([{"role": "user", "content": None}], r"^prompts\[0\] is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"^prompts\[0\] has a message whose content is a list"),
        (None, "^prompts must be a string, a chat or a list of either, got NoneType"),
        (3, "^prompts must be a string, a chat or a list of either, got int"),
        (USER, "^prompts must be a string, a chat or a list of either, got dict"),
        ({"a"}, "^prompts must be a string, a chat or a list of either, got set"),
        (b"hello", r"^prompts"),
        ([3], r"^prompts\[0\] must be a string or a non-empty list of messages, got int"),
        (["a", 0], r"^prompts\[1\] must be a string or a non-empty list of messages, got int"),
        ([None], r"^prompts\[0\] must be a string or a non-empty list of messages, got NoneType"),
        (["a", USER], r"^prompts\[1\] must be a string or a non-empty list of messages, got dict"),
    ],
    ids=repr,
)
def test_everything_else_is_an_error_that_names_the_prompt(prompts: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        as_chats(prompts)
