"""Thoughts, which a reasoning model writes before its answer: they are no part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

OPENING, CLOSING = "<think>", "</think>"
_TAG = re.compile(f"({OPENING}|{CLOSING})")
# A template that begins a thought does so at the prompt's very end.
_TAIL = 32


def without_thoughts(text: str) -> str:
    """What ``text`` says outside of ``<think>`` and ``</think>``.

    A thought that is not closed goes on to the end; a closing tag without an opening one ends a thought that the text
    begins with.
    """
    kept: list[str] = []
    thinking = False
    for part in _TAG.split(text):
        if part == OPENING:
            thinking = True
        elif part == CLOSING:
            if not thinking:
                kept.clear()
            thinking = False
        elif not thinking:
            kept.append(part)
    return "".join(kept)


def spoken(tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """The text of a response without its thoughts; one may have begun in the prompt, where the template wrote it."""
    tail = _text(tokenizer, prompt_ids[-_TAIL:])
    begun = OPENING if tail.rfind(OPENING) > tail.rfind(CLOSING) and not tail.split(OPENING)[-1].strip() else ""
    return without_thoughts(begun + _text(tokenizer, response_ids))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """As `decode` with ``skip_special_tokens``, but with the tags, which are special tokens of some tokenizers."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    tags = {tokenizer.convert_tokens_to_ids(tag): tag for tag in (OPENING, CLOSING)} if special else {}
    text, run = "", list[int]()
    for token in ids:
        if token in special and token in tags:
            text += tokenizer.decode(run, skip_special_tokens=True) + tags[token]
            run = []
        else:
            run.append(token)
    return text + str(tokenizer.decode(run, skip_special_tokens=True))
