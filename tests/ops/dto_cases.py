"""Problems for `dto_step`, and what is demanded of a back end that solves them.

Rounding may decide between two tokens, or which way Adam goes where a gradient is nothing but rounding; problems whose
outcome hangs on the former are not used, and `check` knows the latter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend, double, dto_arguments, logits, native_rounds

RATE, RATES = 0.05, 20


def _left_to_triton(backend: str, rows: int = 1, dense: bool = True, group: Any = None, **_: Any) -> bool:
    return backend.startswith("cuda") and (rows > 4 or not dense or group is not None)


that_kernels_take = pytest.mark.leaves_out(where=_left_to_triton)
"""Kernels in CUDA take few rows that stop one by one, with a dense gradient; Triton has the rest there."""


@dataclass
class Problem:
    """Arguments of `dto_step`; ``state`` is parameters, moments and step counts."""

    state: list[Tensor]
    tokens: Tensor
    rates: Tensor
    gradient: Tensor | TokenGradient
    tables: Tables
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: Any, **options: Any) -> tuple[Tensor, Tensor]:
        rest = (self.tokens, self.rates, self.gradient, self.tables)
        return backend.dto_step(*dto_arguments(*self.state, *rest, **{**self.options, **options}))

    def copy(self) -> Problem:
        """With state of its own, of the same strides."""
        return replace(self, state=[x.clone(memory_format=torch.preserve_format) for x in self.state])

    def exact(self) -> Problem:
        """In float64, with state of its own."""
        options = {name: double(x) for name, x in self.options.items()}
        rest = double((self.tokens, self.rates, self.gradient, self.tables))
        return Problem(double([x.clone() for x in self.state]), *rest, options)

    def with_tokens(self) -> Problem:
        """At the hard tokens of its parameters."""
        exact = self.exact()
        noise = exact.options.get("hard_noise")
        tokens = reference.hard_tokens(exact.state[0], exact.tables.head, self.options["latents"], noise)
        return replace(self, tokens=tokens)


def build(
    rows: int,
    vocabulary: int,
    width: int,
    *,
    latents: bool = True,
    dense: bool = True,
    warm: bool = False,
    dtype: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32,
    tied: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    soft: bool = False,
    hard: bool = False,
    group: list[int] | None = None,
    spread: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A random problem, ``warm`` in the middle of an optimization, with rows at different steps."""
    seed *= 100

    def normal(place: int, n: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
        return (logits(seed + place, n, columns) / 3).to(dtype)

    weight = (spread / math.sqrt(width) * normal(0, vocabulary, width)).to(table)
    embedding = weight if tied else normal(1, vocabulary, width, table)
    tables = Tables(Head(weight, scale, softcap), embedding, normal(2, vocabulary, 8, table), 0.3)
    parameters = normal(3, rows, width) if latents else spread * normal(3, rows, vocabulary)
    moments, step = [torch.zeros_like(parameters), torch.zeros_like(parameters)], torch.zeros(rows, dtype=torch.long)
    if warm:
        moments = [0.1 * normal(4, *parameters.shape), 0.01 + 0.01 * normal(5, *parameters.shape) ** 2]
        step = torch.arange(rows) % 3
    factors = TokenGradient(normal(6, rows, width), 0.3 * normal(7, rows, width), normal(8, rows, 8))
    options |= {
        "latents": latents,
        "soft_noise": normal(9, rows, vocabulary) if soft else None,
        "hard_noise": 0.3 * normal(10, rows, vocabulary) if hard else None,
        "group": None if group is None else torch.tensor(group, dtype=torch.long),
    }
    rates = torch.linspace(RATE, RATE / 10, RATES).to(dtype)
    gradient = normal(11, rows, vocabulary) if dense else factors
    return Problem([parameters, *moments, step], step, rates, gradient, tables, options).with_tokens()


def margin(problem: Problem) -> float:
    """How far the closest row is from another token."""
    z, noise = problem.state[0], problem.options.get("hard_noise")
    z = reference.linear_logits(z, problem.tables.head) if problem.options["latents"] else z
    z = z if noise is None else z + noise
    if z.numel() == 0 or z.shape[1] == 1:
        return math.inf
    top = z.topk(2, dim=-1).values
    return float((top[:, 0] - top[:, 1]).min())


def meant(problem: Problem, steps: int) -> tuple[Problem, Tensor, Tensor, float]:
    """The state after the steps in float64, tokens, changed, and the smallest margin on the way."""
    exact = problem.exact()
    closest = margin(exact)
    token, changed = exact.run(reference, max_steps=0)
    for _ in range(steps):
        token, changed = exact.run(reference, max_steps=1)
        closest = min(closest, margin(exact))
    return exact, token, changed, closest


def clear(problem: Problem, steps: int) -> bool:
    """Whether no rounding decides a token."""
    return meant(problem, steps)[3] > (1e-9 if problem.state[0].dtype == torch.float64 else 1e-3)


def judged(*shape: int, steps: int, seed: int = 0, **options: Any) -> Problem:
    """The first problem from ``seed`` on that is `clear`."""
    return next(p for i in range(100) if clear(p := build(*shape, seed=seed + 10 * i, **options), steps))


def near_rows(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the row's largest entry."""
    assert ours.shape == exact.shape
    if exact.numel():
        bound = tolerance * exact.abs().amax(-1, keepdim=True) + 1e-12
        worst = ((ours.double() - exact).abs() / bound).max()
        assert worst <= 1, f"off by {float(worst):.3g} times the tolerance"


def check(backend: Backend, problem: Problem, steps: int, slack: float = 1.0) -> tuple[Problem, Tensor, Tensor]:
    """Solves a copy and holds it against the reference in float64; the state, tokens and flags of the copy."""
    exact, token, changed, _ = meant(problem, steps)
    ours = problem.copy()
    our_token, our_changed = ours.run(backend, max_steps=steps)
    assert (our_token.dtype, our_changed.dtype) == (torch.int64, torch.bool)
    assert torch.equal(our_token, token)
    assert torch.equal(our_changed, changed)
    assert torch.equal(ours.state[3], exact.state[3])
    parameters, exp_avg, exp_avg_sq, _ = exact.state
    wide = problem.state[0].dtype == torch.float64
    # Rounded logits, divided by tau, are the rounding of the weights. Of float32 rows beside a bfloat16 table Triton
    # keeps 16 bits.
    halves = backend.name == "triton" and problem.tables.head.weight.dtype == torch.bfloat16
    rounding = (4 if halves else 1) * max(2e-5, 5e-6 / problem.options.get("tau", 1.0))
    # Of many such rows the weights of the table are rounded to bfloat16: `back_ends.weight_tolerance`.
    rounded = halves and problem.options["latents"] and len(problem.tokens) > 4
    # Native kernels round them where the processor multiplies bfloat16, of many rows that make several steps.
    if backend.name == "native" and problem.tables.head.weight.dtype == torch.bfloat16 and native_rounds():
        rounded = problem.options["latents"] and not wide and len(problem.tokens) >= 16 and steps >= 3
    # From the first step on, Adam divides a gradient by its own size: where that is rounding, a step is anything up to
    # the learning rate, and later gradients are those of another place.
    warm = bool((problem.state[2] > 1e-3).all())
    tolerance = slack * (1e-9 if wide else rounding if warm or steps < 2 else 30 * rounding)
    if rounded:
        tolerance = 1e-2 if warm or steps < 2 else 5e-2
    near_rows(ours.state[1], exp_avg, tolerance)
    near_rows(ours.state[2], exp_avg_sq, 2 * tolerance)
    moved = RATE * max(steps, 1)
    difference = (ours.state[0].double() - parameters).abs()
    if difference.numel():
        finite = difference[parameters.isfinite()]
        assert float(finite.max()) <= (1e-6 if wide else min(2.2, 100 * tolerance) if warm else 2.2) * moved
        assert float((finite > (1e-6 if wide else 1e-1 if rounded else 2e-3) * moved).double().mean()) <= 0.02
    return ours, our_token, our_changed
