"""The Triton `dto_step` against the reference in float64."""

from __future__ import annotations

import sys
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import few, strided
from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops import triton as kernels
from nabla_fast.ops.triton import _matmul as blocks
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import close, double, dto_arguments, logits


class Case(NamedTuple):
    rows: int = 1
    vocabulary: int = 300
    depth: int = 33
    latents: bool = True
    dense: bool = False
    tied: bool = False
    softcap: float = 0.0
    noise: bool = False
    grouped: bool = False
    table: torch.dtype = torch.float32
    tau: float = 0.8
    learning_rate: float = 0.05
    weight_decay: float = 0.01
    max_steps: int = 3
    limit: int = 5


class Problem(NamedTuple):
    state: list[Tensor]
    step: Tensor
    tokens: Tensor
    rates: Tensor
    gradient: Tensor | TokenGradient
    tables: Tables
    options: dict


def build(case: Case, seed: int = 0) -> Problem:
    n, v, d = case.rows, case.vocabulary, case.depth
    # Logits of a few units: at the cap, or among logits of 100, the token would be a matter of rounding.
    weight = logits(seed, v, d, dtype=case.table) / 8
    embedding = weight if case.tied else logits(seed + 1, v, d, dtype=case.table)
    tables = Tables(Head(weight, 0.7, case.softcap), embedding, logits(seed + 2, v, 8, dtype=case.table), 0.3)
    width = d if case.latents else v
    state = [logits(seed + 3, n, width), 0.1 * logits(seed + 4, n, width), 0.1 * logits(seed + 5, n, width).abs()]
    factors = TokenGradient(logits(seed + 6, n, d), logits(seed + 7, n, d), logits(seed + 8, n, 8))
    soft, hard = (logits(seed + s, n, v) if case.noise else None for s in (9, 10))
    options = {
        "latents": case.latents, "tau": case.tau, "weight_decay": case.weight_decay, "soft_noise": soft,
        "hard_noise": hard, "max_steps": case.max_steps,
        "group": torch.arange(n) // 2 if case.grouped else None,
    }  # fmt: skip
    tokens = reference.hard_tokens(double(state[0]), double(tables.head), case.latents, double(hard))
    if n > 2:
        tokens[1] = (tokens[1] + 1) % v
    rates = torch.linspace(case.learning_rate, case.learning_rate / 10, case.limit, dtype=torch.float64)
    gradient = logits(seed + 11, n, v) if case.dense else factors
    return Problem(state, torch.arange(n) % 3, tokens, rates, gradient, tables, options)


def compare(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both back ends on copies; returns the Triton back end's steps and changed flags.

    Adam divides by the root of what may be a tiny number, so float32 is granted what the reference loses in float32.
    """
    expected, expected_step = double(problem.state), problem.step.clone()
    actual_step = problem.step.clone()
    actual = [x.clone(memory_format=torch.preserve_format) for x in problem.state]
    rest = problem.tokens, problem.rates, problem.gradient, problem.tables
    result = kernels.dto_step(*dto_arguments(*actual, actual_step, *rest, **problem.options))
    doubled = double(rest), {name: double(value) for name, value in problem.options.items()}
    wanted = reference.dto_step(*dto_arguments(*expected, expected_step, *doubled[0], **doubled[1]))
    close(result, wanted)
    assert torch.equal(actual_step, expected_step)
    single = [x.clone() for x in problem.state]
    reference.dto_step(*dto_arguments(*single, problem.step.clone(), *rest, **problem.options))
    for x, y, z in zip(actual, expected, single, strict=True):
        lost = (z.double() - y).abs().max().item() if z.numel() else 0.0
        close(x, y, 2e-5 + 4 * lost)
    return actual_step - problem.step, result[1]


cases = st.builds(
    Case,
    rows=st.sampled_from([1, 3, 7]),
    vocabulary=st.sampled_from([1, 2, 33, 300, 1000]),
    depth=st.sampled_from([8, 33, 64]),
    latents=st.booleans(),
    dense=st.booleans(),
    tied=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    noise=st.booleans(),
    grouped=st.booleans(),
    table=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tau=st.sampled_from([0.3, 1.0, 10.0]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_steps=st.sampled_from([0, 1, 2]),
    learning_rate=st.sampled_from([0.05, 0.3]),
    limit=st.just(5),
)


@few(30)
@given(cases, st.integers(0, 9))
def test_against_the_reference(case, seed):
    compare(build(case, seed))


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rows", [2, 9])
def test_rows_stop_at_different_steps(rows, latents, dense):
    case = Case(rows=rows, latents=latents, dense=dense, learning_rate=0.3 if latents else 0.6, max_steps=6, limit=6)
    made, changed = compare(build(case, seed=1))
    if rows == 9:
        assert len(set(made.tolist())) > 2
        assert changed.any()
        assert not changed.all()


@pytest.mark.parametrize("rows", [4, 9])
def test_groups_stop_together(rows):
    case = Case(rows=rows, latents=rows == 4, grouped=True, learning_rate=0.4, max_steps=4)
    made, _ = compare(build(case, seed=2))
    # Members may start at different steps: one that has none left holds the other.
    assert made[0] == made[1]
    assert made[2] == made[3]


def test_no_rows():
    for latents in (True, False):
        compare(build(Case(rows=0, latents=latents)))


def test_two_calls_are_one():
    """A row that was held goes on in the next call only if its token is the expected one."""
    problem = build(Case(rows=5, learning_rate=0.2, max_steps=4))
    one, two = ([x.clone() for x in problem.state] for _ in range(2))
    step_one, step_two = problem.step.clone(), problem.step.clone()
    rest = problem.tokens, problem.rates, problem.gradient, problem.tables
    first = kernels.dto_step(*dto_arguments(*one, step_one, *rest, **problem.options))
    for _ in range(4):
        second = kernels.dto_step(*dto_arguments(*two, step_two, *rest, **problem.options | {"max_steps": 1}))
    assert torch.equal(step_one, step_two)
    for a, b in zip([*one, *first], [*two, *second], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("latents", [True, False])
def test_sliced_parameters_and_tables(latents):
    problem = build(Case(rows=5, latents=latents, noise=True, dense=True))
    tables = problem.tables
    head = Head(strided(tables.head.weight), 0.7)
    problem = problem._replace(
        state=[strided(x) for x in problem.state], tables=tables._replace(head=head),
        gradient=strided(problem.gradient),
        options=problem.options | {"soft_noise": strided(problem.options["soft_noise"])},
    )  # fmt: skip
    expected, expected_step, actual_step = double(problem.state), problem.step.clone(), problem.step.clone()
    rest = problem.tokens, problem.rates, problem.gradient, problem.tables
    result = kernels.dto_step(*dto_arguments(*problem.state, actual_step, *rest, **problem.options))
    wanted = reference.dto_step(
        *dto_arguments(
            *expected, expected_step, *double(rest), **{name: double(x) for name, x in problem.options.items()}
        )
    )
    close(result, wanted)
    close(problem.state, expected)
    assert torch.equal(actual_step, expected_step)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("latents", [True, False])
def test_a_row_without_meaning_stops_and_says_so(rows, latents):
    problem = build(Case(rows=rows, latents=latents))
    problem.state[0][1, 3] = torch.nan
    before = [x.clone() for x in problem.state]
    step = problem.step.clone()
    rest = problem.tokens, problem.rates, problem.gradient, problem.tables
    current, changed = kernels.dto_step(*dto_arguments(*problem.state, step, *rest, **problem.options))
    assert current[1] == -1
    assert changed[1]
    assert step[1] == problem.step[1]
    for x, y in zip(problem.state, before, strict=True):
        assert torch.equal(x[1].nan_to_num(7.0), y[1].nan_to_num(7.0))
        assert x[0].isfinite().all()
    assert step[0] > problem.step[0]


@pytest.mark.parametrize("latents", [True, False])
def test_a_minus_infinite_noise_masks_entries(latents):
    """Entries that can never be the token; an infinite gradient there moves nothing."""
    problem = build(Case(rows=6, latents=latents, noise=True, dense=True))
    for name in ("soft_noise", "hard_noise"):
        problem.options[name][:, ::3] = -torch.inf
    problem.gradient[:, ::3] = torch.inf
    hard = problem.options["hard_noise"]
    tokens = reference.hard_tokens(double(problem.state[0]), double(problem.tables.head), latents, double(hard))
    compare(problem._replace(tokens=tokens))


@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("latents", [True, False])
def test_blocks_of_rows(latents, kept):
    """Groups reach over the ends of blocks, and G is kept or made for each block."""
    # The package's attribute of this name is the operator.
    module = sys.modules["nabla_fast.ops.triton.dto_step"]
    with patch.object(blocks, "ENTRIES", 3000), patch.object(module, "KEPT", kept):
        for dense in (True, False):
            case = Case(rows=8, vocabulary=1000, latents=latents, dense=dense, grouped=True, noise=not dense)
            made, changed = compare(build(case))
            assert made.any()
            assert changed.any()


def test_rows_that_have_all_stopped_cost_no_further_step():
    problem = build(Case(rows=6, max_steps=5))
    problem = problem._replace(tokens=(problem.tokens + 1) % 300)
    module = sys.modules["nabla_fast.ops.triton.dto_step"]
    with patch.object(module, "times_rows", None), patch.object(module, "row_state", wraps=module.row_state) as passes:
        made, changed = compare(problem)
    assert passes.call_count == 1
    assert not made.any()
    assert changed.all()


def test_a_gradient_that_is_not_kept_is_not_made_for_rows_that_have_stopped():
    problem = build(Case(rows=6, latents=False, max_steps=5))
    problem = problem._replace(tokens=(problem.tokens + 1) % 300)
    module = sys.modules["nabla_fast.ops.triton.dto_step"]
    with patch.object(module, "KEPT", 0), patch.object(module, "write_gradient", wraps=module.write_gradient) as made:
        compare(problem)
    assert made.call_count == 1


def test_half_precision_parameters_are_refused():
    problem = build(Case())
    state = [x.half() for x in problem.state]
    rest = problem.tokens, problem.rates, problem.gradient, problem.tables
    with pytest.raises(ValueError, match="parameters must be float32"):
        kernels.dto_step(*dto_arguments(*state, problem.step, *rest, **problem.options))
