"""`dto_step`: straight-through gradient, Adam, next hard token, for as long as a row's hard token stays the same.

Every step of a call is launched at once. A row that may not move is marked on the device, and the launches that follow
find the mark and do nothing, so no step waits for the host to learn of a change. Per step:

    few rows of latents   one pass over W (read once, from registers used twice), a merge of its parts, Adam
    rows of latents       statistics and <p, G> (logits once), then weights and their product with W by chunks
    rows of logits        statistics and <p, G>, then dL/dz and Adam in one launch (by chunks if G comes from factors)

Work of a step for many rows, in units of 2 N V d: latents 3, and 2 for each further vector on a table that is not
dense G; logits from factors 2 per table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops.operands import Tables, TokenGradient
from nabla_fast.ops.triton.dto_update import Rows
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.one_row import OneRowPass, fits
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.sources import Gradient, Logits, from_factors
from nabla_fast.ops.triton.vocabulary_sum import chunk_length, sum_in_chunks
from nabla_fast.ops.triton.weights import write_weights

State = tuple[Tensor, Tensor]


class _Problem(NamedTuple):
    """What a step needs besides the rows' flags."""

    rows: Rows
    logits: Logits
    gradient: Gradient
    inv_tau: float
    soft: Tensor | None
    hard: Tensor | None


def dto_step(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Tensor | TokenGradient,
    tables: Tables,
    *,
    latents: bool,
    tau: float = 1.0,
    weight_decay: float = 0.0,
    soft_noise: Tensor | None = None,
    hard_noise: Tensor | None = None,
    group: Tensor | None = None,
    max_steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """`reference.dto_step` on float32 parameters; a row without a hard token has token -1 and stops."""
    check(parameters, exp_avg, exp_avg_sq, tables.head.weight)
    if parameters.dtype != torch.float32:
        raise ValueError(f"parameters must be float32 for backend 'triton', got {parameters.dtype}")
    if not len(parameters):
        return torch.empty_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    inv_tau = 1.0 / tau
    rows = Rows(parameters, exp_avg, exp_avg_sq, step, tokens, learning_rates, group, weight_decay, inv_tau)
    logits = Logits(tables.head, h=parameters) if latents else Logits(tables.head, z=parameters)
    problem = _Problem(rows, logits, from_factors(gradient, tables), inv_tau, soft_noise, hard_noise)
    move = _one_row_steps(problem) if latents and _few(problem) else _latents_steps if latents else _logits_steps
    state: State | None = None
    for made in range(max_steps):
        state = move(problem, made, state)
    rows.decide(_tokens(problem), max_steps)
    step += rows.made
    return rows.current, rows.current != tokens


def _few(problem: _Problem) -> bool:
    parameters = problem.rows.parameters
    return fits(len(parameters), [parameters.shape[1], *(table.shape[1] for _, table in problem.gradient.terms)])


def _tokens(problem: _Problem) -> State:
    """The pass that takes the hard tokens alone."""
    rows, z = problem.rows, problem.logits.z
    if z is not None:
        return row_state(z, problem.inv_tau, hard=problem.hard, held=rows.held)
    return linear_state(problem.logits, problem.inv_tau, hard=problem.hard, held=rows.held)[0]


def _one_row_steps(problem: _Problem) -> Callable[[_Problem, int, State | None], State]:
    run = OneRowPass(problem.logits, problem.gradient, problem.rows.expected)

    def move(problem: _Problem, made: int, state: State | None) -> State:
        rows = problem.rows
        run.run(problem.inv_tau, problem.soft, problem.hard, rows.held)
        rows.decide(run.state, made)
        assert problem.logits.head is not None
        rows.update_latents(run.sums, run.state[0], problem.logits.head.scale, made)
        return run.state

    return move


def _check_rows(problem: _Problem, made: int, state: State | None) -> State:
    """Hard tokens, softmax and <p, G> of the rows that still move."""
    rows, gradient, soft, hard = problem.rows, problem.gradient, problem.soft, problem.hard
    held, inv_tau, z = rows.held, problem.inv_tau, problem.logits.z
    if z is not None and gradient.dense is not None:
        state = row_state(z, inv_tau, soft=soft, hard=hard, gradient=gradient.dense, held=held, state=state)
    else:
        state, _ = linear_state(problem.logits, inv_tau, gradient, soft=soft, hard=hard, held=held, state=state)
    rows.decide(state, made)
    return state


def _writer(problem: _Problem) -> Callable[[Tensor, int], None]:
    """Writes a chunk of dL/dz."""
    rows = problem.rows

    def write(chunk: Tensor, first: int) -> None:
        write_weights(
            chunk, problem.logits, problem.inv_tau, "relaxed", rows.top, rows.inverse, first=first,
            gradient=problem.gradient, q=rows.q, soft=problem.soft, held=rows.held,
        )  # fmt: skip

    return write


def _latents_steps(problem: _Problem, made: int, state: State | None) -> State:
    state = _check_rows(problem, made, state)
    head, held = problem.logits.head, problem.rows.held
    assert head is not None
    total = sum_in_chunks(problem.logits, head.weight, _writer(problem), held)
    problem.rows.update_latents(total.sums, None, head.scale, made)
    return state


def _logits_steps(problem: _Problem, made: int, state: State | None) -> State:
    state = _check_rows(problem, made, state)
    rows, dense = problem.rows, problem.gradient.dense
    if dense is not None:
        rows.update_logits(made, dense=dense, soft=problem.soft)
        return state
    count, vocabulary = rows.parameters.shape
    length = min(chunk_length(count), vocabulary)
    scratch = torch.empty(count, length, dtype=torch.float32, device=rows.parameters.device)
    write = _writer(problem)
    for first in range(0, vocabulary, length):
        chunk = scratch[:, : min(length, vocabulary - first)]
        write(chunk, first)
        rows.update_logits(made, dz=chunk, first=first, dense=None, soft=None)
    return state
