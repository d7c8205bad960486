"""What is found out about tokenizers, kept for as long as they are as they were: every call asks the same again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_Facts = dict[Hashable, tuple[Hashable, Any]]
_FOUND: WeakKeyDictionary[Any, WeakKeyDictionary[Any, _Facts]] = WeakKeyDictionary()


def remembered(
    tokenizer: Any,
    other: Any,
    what: Hashable,
    find: Callable[[], T],
    keep: Callable[[T], bool] = lambda _: True,
) -> T:
    """``find()``, or what it gave for these two tokenizers before, if both are as they were then.

    Args:
        other: another tokenizer that the answer depends on, or the same.
        what: names the question.
        keep: False for an answer that is to be found anew every time, as one that comes with a warning.
    """
    state = (_state(tokenizer), _state(other))
    if None in state:
        return find()
    facts = _FOUND.setdefault(tokenizer, WeakKeyDictionary()).setdefault(other, {})
    known = facts.get(what)
    if known is not None and known[0] == state:
        value: T = known[1]
        return value
    value = find()
    if keep(value):
        facts[what] = state, value
    return value


def vocabulary_size(tokenizer: Any) -> int:
    """The highest token id of a tokenizer, plus one."""
    return remembered(tokenizer, tokenizer, "size", lambda: max(tokenizer.get_vocab().values()) + 1)


def _state(tokenizer: Any) -> Hashable:
    """What changes when tokens are added to a fast tokenizer, or its rules change; None for others."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    own = tokenizer.backend_tokenizer
    try:
        rules = [None if part is None else part.__getstate__() for part in (own.normalizer, own.pre_tokenizer)]
    except Exception:  # rules that are written in Python
        return None
    switches = (tokenizer.unk_token, getattr(tokenizer, "split_special_tokens", None))
    return (len(tokenizer), tuple(tokenizer.all_special_ids), *rules, *switches)
