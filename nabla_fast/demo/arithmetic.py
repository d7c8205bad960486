"""The pair of models that ships with the package, and the arithmetic problems that it is made for.

A problem is an expression such as ``47 * 8 + 125 - 36 * 4``. Its solution writes out every step: the products from
left to right, then the sums and differences, then the result in a box.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_fast.config import NablaConfig

if TYPE_CHECKING:
    import torch

POLICY_PATH = Path(__file__).parent / "arithmetic_policy"
REWARD_PATH = Path(__file__).parent / "arithmetic_reward"

# Of the test split; greedy decoding goes wrong in it.
QUESTION = "Compute 64 * 4 + 505 - 34 * 7 - 15."

# Longest solution: 2 products of 9 tokens, 3 sums of 12, a box of 5 and the end. The rest is what
# `benchmarks/quality.py tune` chose on the tuning split.
CONFIG = NablaConfig(
    max_new_tokens=64,
    anchor="rollout",
    learning_rate=3.0,
    reward_coeff=10.0,
    confidence_threshold=0.7,
    gradient_threshold=None,
)

SPLITS = ("train", "validation", "tuning", "test")
_LARGEST = 999
_SIXTEENTHS = {0: "test", 1: "tuning", 2: "validation"}


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
        terms: list[tuple[int, ...]] = [(rng.randint(12, 99), rng.randint(3, 9)) for _ in range(2)]
        terms += [(rng.randint(10, _LARGEST),) for _ in range(rng.randint(1, 2))]
        rng.shuffle(terms)
        operators = [rng.choice("+-") for _ in terms[1:]]
        steps = _solve(terms, operators)
        if all(0 <= result <= _LARGEST for *_, result in steps):
            texts = [" * ".join(map(str, term)) for term in terms]
            rest = "".join(f" {operator} {text}" for operator, text in zip(operators, texts[1:], strict=True))
            return Arithmetic(texts[0] + rest, steps)


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


def load_policy(
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
) -> tuple[Any, Any]:
    """The bundled language model (3.4 million parameters, d 256, 4 layers) and its tokenizer.

    Raises:
        ValueError: if ``device``, ``dtype`` or ``attn_implementation`` is unknown.
    """
    from nabla_fast.models.loading import load_language_model

    return load_language_model(POLICY_PATH, device=device, dtype=dtype, attn_implementation=attn_implementation)


def load_reward(
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
) -> tuple[Any, Any]:
    """The bundled reward model, of the policy's size and vocabulary, and its tokenizer.

    Raises:
        ValueError: if ``device``, ``dtype`` or ``attn_implementation`` is unknown.
    """
    from nabla_fast.models.loading import load_reward_model

    return load_reward_model(REWARD_PATH, device=device, dtype=dtype, attn_implementation=attn_implementation)


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
