"""The four reasoning-gym tasks that the demo reward model is trained and measured on.

Everything that decides how a question is asked and what counts as a right answer lives here, so that training,
evaluation and the demo cannot disagree.
"""

from __future__ import annotations

import re
from typing import Any

Entry = dict[str, Any]

# Sizes at which SmolLM2-135M-Instruct is neither always right nor always wrong.
TASKS: dict[str, dict[str, int]] = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}

# A digit or letter before the minus makes it a subtraction ("9-4" ends in 4, not in -4).
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


def load_task(name: str, *, seed: int, size: int) -> Any:
    """The reasoning-gym data set ``name`` at the demo's problem size.

    Entry i of a data set with seed s is drawn from s + i alone, so two seeds closer than ``size`` share problems.

    Returns:
        A data set of ``size`` entries (``question``, ``answer``, ``metadata``) with a ``score_answer`` method.

    Raises:
        ValueError: if ``name`` is none of ``TASKS``.
        ImportError: if reasoning-gym is not installed.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError('the demo tasks need reasoning-gym; run pip install "nabla_fast[eval]"') from error
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **TASKS[name])


def task_chat(entry: Entry) -> list[dict[str, str]]:
    """The chat that asks the question of ``entry``, worded as reasoning-gym words it."""
    return [{"role": "user", "content": entry["question"]}]


def extract_number(response: str) -> str | None:
    """The last number in ``response``, its commas removed, or None where there is none.

    A small chat model puts its answer into a sentence ("3 * 6 = 18") and cannot be made to use answer tags, while
    reasoning-gym grades a bare number.
    """
    span = answer_span(response)
    return None if span is None else response[slice(*span)].replace(",", "")


def answer_span(response: str) -> tuple[int, int] | None:
    """Start and end, in characters, of the number that ``extract_number`` reads, or None."""
    matches = list(_NUMBER.finditer(response))
    return matches[-1].span() if matches else None


def is_right(dataset: Any, entry: Entry, response: str) -> bool:
    """Whether ``response`` answers ``entry``, by the data set's own ``score_answer`` (full score only)."""
    return bool(dataset.score_answer(extract_number(response), entry) >= 1.0)
