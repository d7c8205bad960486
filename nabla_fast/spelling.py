"""Token ids as the text that a reader sees, whichever tokens share a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character
_LONGEST = 8  # tokens; no character takes more, so longer runs are bytes that never become one


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that have a text together: one token, or the few that form a character.

    Attributes:
        start, end: the tokens are those at positions ``start`` to ``end - 1``.
        text: what they add to the text; of a special token, its name.
        special: whether it is a special token, which is no part of the text.
    """

    start: int
    end: int
    text: str
    special: bool = False


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """All tokens of a response, in order.

    The texts that are not special are, one after the other, what the tokenizer decodes the response to.

    Args:
        tokenizer: a transformers tokenizer.
        ids: (n,) token ids.
    """
    special = set(tokenizer.all_special_ids)
    found: list[Piece] = []
    # Some decoders write a token otherwise at the beginning of a text, so each is decoded behind one that has a text.
    context = start = 0
    for end in range(1, len(ids) + 1):
        is_special = ids[end - 1] in special
        last = end - 1 if is_special else end
        if start < last:
            text = _added(tokenizer, ids[context:last], start - context)
            unfinished = text.endswith(UNFINISHED) and last - start < _LONGEST
            if unfinished and not is_special and end < len(ids):
                continue
            found.append(Piece(start, last, text))
            context = start if text else context
        if is_special:
            found.append(Piece(last, end, _name(tokenizer, ids[last]), special=True))
        start = end
    return found


def spelled(tokenizer: Any, token: int) -> str:
    """One token alone; its name in the vocabulary where its bytes are no whole character, or it has no text."""
    text = "" if token in tokenizer.all_special_ids else _decoded(tokenizer, [token])
    return _name(tokenizer, token) if not text or UNFINISHED in text else text


def _added(tokenizer: Any, ids: Sequence[int], known: int) -> str:
    """What the tokens from the ``known``-th on add to the text of those before them."""
    before, whole = _decoded(tokenizer, ids[:known]), _decoded(tokenizer, ids)
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, ids[known:])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True) if len(ids) else ""
    return text


def _name(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))
