"""Whether a response answers a problem: by math-verify, or by a reasoning-gym data set's own `score_answer`.

Nothing is graded by rules of our own. What is ours is where a reasoning-gym answer stands in a response, because
reasoning-gym grades the bare answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from nabla_fast.evaluation import math_process

# A digit or letter before the minus makes it a subtraction ("9-4" ends in 4, not in -4).
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


class GradingError(ValueError):
    """An answer that cannot be graded."""


class Grader(Protocol):
    """Grades the responses to the problems of one task."""

    def check(self, problem_id: str, reference: str) -> None:
        """Raises GradingError if no response to the problem could be graded."""

    def answer(self, problem_id: str, response: str) -> Any | None:
        """What ``response`` gives as its answer, for `same`, `right` and, as text, a reader; None if it gives none."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two answers are the same, for a majority vote; it knows nothing of the reference answer."""

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        """Whether ``answer`` is right; raises GradingError if the grader fails."""


@dataclass(frozen=True)
class MathAnswer:
    """What math-verify found in a response, as text; compared by the response, since it may have several forms."""

    response: str
    found: str

    def __str__(self) -> str:
        return self.found


class MathGrader:
    """Mathematics, by math-verify: what it extracts from a response, and what it takes to be equal.

    It works in a process of its own (`nabla_fast.evaluation.math_process`), so that its limits hold in every thread:
    what takes too long is no answer, and equal to nothing.

    Raises:
        ImportError: if math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ImportError('grading mathematics needs math-verify; run pip install "nabla_fast[eval]"') from error
        self._references: set[str] = set()

    def check(self, problem_id: str, reference: str) -> None:
        if reference not in self._references:
            if math_process.shared().parse(_marked(reference)) is None:
                raise GradingError(f"the reference answer {reference!r} cannot be graded; math-verify finds none in it")
            self._references.add(reference)

    def answer(self, problem_id: str, response: str) -> MathAnswer | None:
        found = math_process.shared().parse(response)
        return None if found is None else MathAnswer(response, found)

    def same(self, one: Any, other: Any) -> bool:
        return math_process.shared().same(one.response, other.response)

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        self.check(problem_id, reference)
        return answer is not None and math_process.shared().same(_marked(reference), answer.response)


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
        pass

    def answer(self, problem_id: str, response: str) -> str | None:
        tagged = self._tagged(response)
        text = response if tagged is None else tagged
        return extract_number(text) if self._numbers else text.strip() or None

    def same(self, one: Any, other: Any) -> bool:
        # score_answer would tell here what is right, where it checks an answer against the problem itself.
        return _comparable(one) == _comparable(other)

    def right(self, problem_id: str, reference: str, answer: Any | None) -> bool:
        try:
            return bool(self._dataset.score_answer(answer, self._entries[problem_id]) >= 1.0)
        except Exception as error:
            raise GradingError(f"score_answer failed on {answer!r}: {type(error).__name__}: {error}") from error


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


def is_number(text: str) -> bool:
    """Whether ``text`` is a number and nothing else."""
    return extract_number(text) == text.strip().replace(",", "")


def _comparable(answer: str) -> Decimal | str:
    try:
        return Decimal(answer)
    except InvalidOperation:
        return " ".join(answer.split())


def _marked(reference: str) -> str:
    # A bare reference is mathematics throughout; math-verify looks for it inside a mark.
    return reference if "$" in reference or "\\boxed" in reference else f"\\boxed{{{reference}}}"
