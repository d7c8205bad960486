"""What a line of the results must hold to be read: whoever wrote it may have been another program."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_fast.evaluation.journal import Record
from nabla_fast.stats import PHASES, SequenceStats

Key = tuple[str, int, int, str]
"""(method, n, seed, problem id)."""

COUNTERS = (*SequenceStats().counters(), "tokens")
"""Names of the counters of an answer."""


def key(record: Record) -> Key:
    """Which piece of work a record is of."""
    return record["method"], record["n"], record["seed"], record["problem"]


def latest(records: Sequence[Record]) -> list[Record]:
    """One record for each piece of work, the last one where a failed problem was tried again."""
    return list({key(record): record for record in records}.values())


def require_records(file: Path, records: Sequence[Record], keys: Collection[Key] | None = None) -> None:
    """Checks that records, one a line of ``file``, are what an evaluation writes.

    Args:
        keys: all that there is to do; None where this is not known.

    Raises:
        ValueError: for the first that is not; the message gives its line.
    """
    known = None if keys is None else set(keys)
    for number, record in enumerate(records, start=1):
        why = _fault(record)
        if why is None and known is not None and key(record) not in known:
            method, n, seed, problem = key(record)
            why = f"is of {method} {n}, seed {seed}, problem {problem!r}, which is no part of this run"
        if why is not None:
            raise ValueError(
                f"line {number} of {file} {why}, so it is not a file of this run's results; nothing was changed"
            )


def _fault(record: Record) -> str | None:
    """What is wrong with a record by itself."""
    expected = dict(_ALWAYS)
    if "text" in record or record.get("error") is None:
        expected |= _ANSWERED
    for name, (accepts, meant) in (expected | _OPTIONAL).items():
        if name not in record and name in expected:
            return f'has no "{name}"'
        if name in record and not accepts(record[name]):
            return f'has the "{name}" {str(record[name])[:80]!r}, which is not {meant}'
    if record["error"] is None and record["right"] is None:
        return 'has neither an "error" nor a grade in "right"'
    return None


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_natural(value: Any) -> bool:
    return _is_amount(value) and value >= 0


def _are_phases(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) <= set(PHASES) and all(map(_is_natural, value.values()))


def _is_a(*kinds: type) -> Callable[[Any], bool]:
    # A bool is no int here.
    return lambda value: type(value) in kinds


_Field = tuple[Callable[[Any], bool], str]
_NULL = type(None)
_TEXT: _Field = (_is_a(str), "text")
_COUNT: _Field = (_is_a(int), "a whole number")
_NATURAL: _Field = (_is_natural, "a number of at least 0")
_AMOUNT_OR_NULL: _Field = (lambda value: value is None or _is_amount(value), "a number or null")

_ALWAYS: dict[str, _Field] = {
    "method": _TEXT,
    "n": _COUNT,
    "seed": _COUNT,
    "problem": _TEXT,
    "error": (_is_a(str, _NULL), "text or null"),
    "right": (_is_a(bool, _NULL), "true, false or null"),
}
_ANSWERED: dict[str, _Field] = {
    "text": _TEXT,
    **dict.fromkeys((*COUNTERS, "flops", "seconds"), _NATURAL),
    "reward": _AMOUNT_OR_NULL,
    "reward_before": _AMOUNT_OR_NULL,
    "phases": (_are_phases, f"seconds of {', '.join(PHASES)}"),
}
_OPTIONAL: dict[str, _Field] = {
    # Only where there is one.
    "budget": _TEXT,
    # Records of version 0.1.0 before its release have none.
    "finish_reason": (lambda value: value in ("stop", "length", None), '"stop", "length" or null'),
}
