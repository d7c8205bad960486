"""Whether a response answers a problem: by math-verify, or by a reasoning-gym data set's own `score_answer`.

Nothing is graded by rules of our own. What is ours is where a reasoning-gym answer stands in a response, because
reasoning-gym grades the bare answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from nabla_fast.demo.tasks import extract_number

_TIMEOUT_SECONDS = 5


class GradingError(ValueError):
    """An answer that cannot be graded."""


class Grader(Protocol):
    """Grades the responses to the problems of one task."""

    def check(self, problem_id: str, reference: str) -> None:
        """Raises GradingError if no response to the problem could be graded."""

    def answer(self, problem_id: str, response: str) -> Any | None:
        """What ``response`` gives as its answer, in a form for `same`, `text` and `right`; None if it gives none."""

    def text(self, answer: Any) -> str:
        """An answer as a reader sees it."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two answers are the same, for a majority vote; it knows nothing of the reference answer."""

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        """Whether ``answer`` is right; raises GradingError if the grader fails."""


class MathGrader:
    """Mathematics, by math-verify: what it extracts from a response, and what it takes to be equal.

    Raises:
        ImportError: if math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ImportError('grading mathematics needs math-verify; run pip install "nabla_fast[eval]"') from error
        self._parse = math_verify.parse
        self._verify = math_verify.verify
        self._references: dict[str, list[Any]] = {}

    def check(self, problem_id: str, reference: str) -> None:
        """See `Grader.check`."""
        self._reference(reference)

    def answer(self, problem_id: str, response: str) -> list[Any] | None:
        """See `Grader.answer`."""
        return self._parse(response, parsing_timeout=_timeout()) or None

    def text(self, answer: Any) -> str:
        """See `Grader.text`."""
        # math-verify puts the text that it read after what it made of it.
        return str(answer[-1])

    def same(self, one: Any, other: Any) -> bool:
        """See `Grader.same`."""
        return bool(self._verify(one, other, timeout_seconds=_timeout()))

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        """See `Grader.right`."""
        gold = self._reference(reference)
        return answer is not None and bool(self._verify(gold, answer, timeout_seconds=_timeout()))

    def _reference(self, reference: str) -> list[Any]:
        if reference not in self._references:
            # A bare reference is mathematics throughout; math-verify looks for it inside a mark.
            marked = reference if "$" in reference or "\\boxed" in reference else f"\\boxed{{{reference}}}"
            self._references[reference] = self._parse(marked, parsing_timeout=_timeout())
        if not self._references[reference]:
            raise GradingError(f"the reference answer {reference!r} cannot be graded; math-verify finds none in it")
        return self._references[reference]


class GymGrader:
    """Tasks of reasoning-gym, by the data set's own ``score_answer``; right is the full score.

    An answer is what stands in the last ``<answer>`` tag; without one, the last number of a response where the answers
    of the task are numbers, and the whole response where they are not.

    Args:
        dataset: the reasoning-gym data set.
        entries: problem id → entry.
        numbers: whether the answers of the task are numbers.
    """

    def __init__(self, dataset: Any, entries: Mapping[str, Any], numbers: bool) -> None:
        from reasoning_gym.utils import extract_answer

        self._dataset = dataset
        self._entries = entries
        self._numbers = numbers
        self._tagged = extract_answer

    def check(self, problem_id: str, reference: str) -> None:
        """See `Grader.check`."""

    def answer(self, problem_id: str, response: str) -> str | None:
        """See `Grader.answer`."""
        tagged = self._tagged(response)
        text = response if tagged is None else tagged
        return extract_number(text) if self._numbers else text.strip() or None

    def text(self, answer: Any) -> str:
        """See `Grader.text`."""
        return str(answer)

    def same(self, one: Any, other: Any) -> bool:
        """See `Grader.same`."""
        # score_answer would tell here what is right, where it checks an answer against the problem itself.
        return _comparable(one) == _comparable(other)

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        """See `Grader.right`."""
        try:
            return bool(self._dataset.score_answer(answer, self._entries[problem_id]) >= 1.0)
        except Exception as error:
            raise GradingError(f"score_answer failed on {answer!r}: {type(error).__name__}: {error}") from error


def is_number(text: str) -> bool:
    """Whether ``text`` is a number and nothing else."""
    return extract_number(text) == text.strip().replace(",", "")


def _comparable(answer: str) -> Decimal | str:
    try:
        return Decimal(answer)
    except InvalidOperation:
        return " ".join(answer.split())


def _timeout() -> int | None:
    # math-verify's limit is an alarm signal, which Python delivers to the main thread alone.
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
