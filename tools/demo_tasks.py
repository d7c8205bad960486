"""The reasoning-gym tasks of `nabla_fast.demo.example`: how a question is asked and what counts as a right answer.

Training and evaluation of the reward model take it from here, so that they cannot disagree.
"""

from __future__ import annotations

from typing import Any

from nabla_fast.demo.example import TASKS
from nabla_fast.evaluation.grading import extract_number

Entry = dict[str, Any]


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


def is_right(dataset: Any, entry: Entry, response: str) -> bool:
    """Whether ``response`` answers ``entry``, by the data set's own ``score_answer`` (full score only)."""
    return bool(dataset.score_answer(extract_number(response), entry) >= 1.0)
