"""The arithmetic problems that the pair of models in this package is made for.

A problem is an expression such as ``47 * 8 + 125 - 36 * 4``. Its solution writes out every step: the products from
left to right, then the sums and differences, then the result in a box.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

SPLITS = ("train", "validation", "tuning", "test")
_LARGEST = 999
_SIXTEENTHS = {0: "test", 1: "tuning", 2: "validation"}
_TERM = r"(?:(?:1[2-9]|[2-9]\d) \* [3-9]|[1-9]\d\d?)"
_QUESTION = re.compile(rf"Compute ({_TERM}(?: [+-] {_TERM})+)\.")


@dataclass(frozen=True)
class Arithmetic:
    """A problem.

    Attributes:
        expression: what is to be computed.
        steps: (left, operator, right, result) in the order of the solution.
    """

    expression: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def question(self) -> str:
        """The user's message."""
        return f"Compute {self.expression}."

    @property
    def answer(self) -> int:
        """The result."""
        return self.steps[-1][3]

    @property
    def solution(self) -> str:
        """The response that the policy is trained on."""
        return write_solution(self.steps)

    @property
    def split(self) -> str:
        """The one of `SPLITS` that this expression belongs to, whoever draws it: no two splits share a problem."""
        return _SIXTEENTHS.get(sha256(self.expression.encode()).digest()[0] % 16, "train")


def write_solution(steps: tuple[tuple[int, str, int, int], ...]) -> str:
    """Steps as text, the last result in a box."""
    lines = [f"{left} {operator} {right} = {result}" for left, operator, right, result in steps]
    return "\n".join([*lines, f"\\boxed{{{steps[-1][3]}}}"])


def draw_problem(rng: random.Random) -> Arithmetic:
    """A problem with two products and one or two other numbers; no value passes 999 or falls below 0."""
    while True:
        terms = [f"{rng.randint(12, 99)} * {rng.randint(3, 9)}" for _ in range(2)]
        terms += [str(rng.randint(10, _LARGEST)) for _ in range(rng.randint(1, 2))]
        rng.shuffle(terms)
        rest = "".join(f" {rng.choice('+-')} {term}" for term in terms[1:])
        problem = read_problem(f"Compute {terms[0]}{rest}.")
        if problem is not None:
            return problem


def read_problem(question: str) -> Arithmetic | None:
    """The problem that a user's message asks, or None if it is none that `draw_problem` can give."""
    found = _QUESTION.fullmatch(question)
    if found is None:
        return None
    first, *rest = re.split(r" ([+-]) ", found[1])
    terms = [tuple(map(int, term.split(" * "))) for term in (first, *rest[1::2])]
    steps = _solve(terms, rest[::2])
    fits = sum(len(term) == 2 for term in terms) == 2 and len(terms) in (3, 4)
    return Arithmetic(found[1], steps) if fits and all(0 <= result <= _LARGEST for *_, result in steps) else None


def problems(split: str, *, seed: int = 0) -> Iterator[Arithmetic]:
    """Distinct problems of a split without end, the same ones for the same seed.

    Raises:
        ValueError: if ``split`` is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while True:
        problem = draw_problem(rng)
        if problem.split == split and problem.expression not in seen:
            seen.add(problem.expression)
            yield problem


def _solve(terms: list[tuple[int, ...]], operators: list[str]) -> tuple[tuple[int, str, int, int], ...]:
    products = [(term[0], "*", term[1], term[0] * term[1]) for term in terms if len(term) == 2]
    values = [term[0] * term[1] if len(term) == 2 else term[0] for term in terms]
    sums = []
    total = values[0]
    for operator, value in zip(operators, values[1:], strict=True):
        result = total + value if operator == "+" else total - value
        sums.append((total, operator, value, result))
        total = result
    return (*products, *sums)
