"""`dto_step`: straight-through gradient, Adam, next hard token, for as long as a row's hard token stays the same.

A row that may not move is marked on the device, and the launches that follow find the mark and do nothing. Per step:

    few rows of latents   one pass over W (read once, from registers used twice), a merge of its parts, Adam
    rows of latents       by blocks of rows: logits, statistics with <p, D>, weights, their product with W; then Adam
    rows of logits        statistics with <p, D>, then dL/dz and Adam in one launch

with D = G - G(expected token): relative to it the gradient of a nearly certain token keeps its digits.
Products of the matrix library know no marks, so blocks of latents ask before the second half of a step whether any of
their rows still moves, and wait for the answer, as rows of logits do whose G is not kept; nothing else waits for the
GPU. Work of a step for many rows of latents, in units of 2 N V d: 4 with a bfloat16 head, 2 with a float32 one, and
what G takes where it comes from factors that are too many to keep its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._dto_one_row import OneRowPass, fits
from nabla_fast.ops.triton._dto_rows import Rows
from nabla_fast.ops.triton._gradient import at_tokens, from_factors
from nabla_fast.ops.triton._launch import check
from nabla_fast.ops.triton._matmul import (
    Scratch,
    logits_in_blocks,
    row_blocks,
    write_gradient,
)
from nabla_fast.ops.triton._softmax import (
    weight_dtypes,
    write_weights,
)
from nabla_fast.ops.triton.stats import row_state
from nabla_fast.ops.types import (
    DTOInputs,
    DTOOptions,
    DTOState,
    DTOStep,
    Tables,
    TokenGradient,
)

# Entries of G that are kept from step to step: 1 GiB.
KEPT = 2**28
Step = Callable[[int], bool]


class _Problem(NamedTuple):
    """What a step needs besides the rows' flags."""

    rows: Rows
    gradient: Tensor | TokenGradient
    tables: Tables
    inv_tau: float
    soft: Tensor | None
    hard: Tensor | None


def dto_step(state: DTOState, inputs: DTOInputs, tables: Tables, options: DTOOptions) -> DTOStep:
    """`reference.dto_step` on float32 parameters."""
    parameters, gradient, latents = state.parameters, inputs.gradient, options.latents
    factors = [gradient] if isinstance(gradient, Tensor) else [*gradient, tables.embedding, tables.reward_embedding]
    check(*state[:3], *factors, *([tables.head.weight] if latents else []))
    if parameters.dtype != torch.float32:
        raise ValueError(f"parameters must be float32 for backend 'triton', got {parameters.dtype}")
    if not len(parameters):
        return DTOStep(torch.empty_like(state.tokens), torch.zeros_like(state.tokens, dtype=torch.bool))
    rows = Rows(state, inputs, options)
    problem = _Problem(rows, gradient, tables, rows.inv_tau, inputs.soft_noise, inputs.hard_noise)
    few = fits(len(parameters), [table.shape[1] for table in (tables.head.weight, *tables[1:3])])
    steps, tokens_now = (_one_row if few else _latents_blocks)(problem) if latents else _logits_rows(problem)
    for made in range(options.max_steps):
        if not steps(made):
            break
    else:
        tokens_now(options.max_steps)
    state.step.add_(rows.made)
    return DTOStep(rows.current, (rows.current != state.tokens) | (rows.current < 0))


def _one_row(problem: _Problem) -> tuple[Step, Step]:
    rows, tables = problem.rows, problem.tables
    gradient = from_factors(problem.gradient, tables)
    over = OneRowPass(rows.parameters, tables.head, gradient, rows.expected)

    def look(made: int) -> bool:
        over.run(problem.inv_tau, problem.soft, problem.hard, rows.held)
        rows.decide(over.state, made)
        return True

    def move(made: int) -> bool:
        look(made)
        rows.update_latents(over.sums, over.state[0], tables.head.scale, made)
        return True

    return move, look


def _latents_blocks(problem: _Problem) -> tuple[Step, Step]:
    rows, head = problem.rows, problem.tables.head
    parameters = rows.parameters
    scratch = Scratch(len(parameters), head.weight.shape[0], parameters.device)
    dense = _dense(problem, scratch)
    dtypes = weight_dtypes(parameters.dtype, head.weight.dtype)
    origin = _origin(problem)
    sums = torch.empty(1, *parameters.shape, dtype=torch.float32, device=parameters.device)

    def move(made: int) -> bool:
        moving = False
        for block, z in logits_in_blocks(parameters, head, scratch):
            g, soft, held = dense(block), _rows(problem.soft, block), rows.held[block]
            state = row_state(
                z, problem.inv_tau, soft=soft, hard=_rows(problem.hard, block), gradient=g, origin=origin[block],
                held=held,
            )  # fmt: skip
            rows.decide(state, made, block)
            if not rows.moving(block):
                continue
            moving = True
            weights = write_weights(
                scratch.weights(len(z), dtypes), z, problem.inv_tau, "relaxed", rows.top[block], rows.inverse[block],
                gradient=g, origin=origin[block], q=rows.q[block], soft=soft, held=held, softcap=head.softcap,
            )  # fmt: skip
            times_rows(weights, head.weight, sums[0, block])
        if moving:
            rows.update_latents(sums, None, head.scale, made)
        return moving

    def look(made: int) -> bool:
        for block, z in logits_in_blocks(parameters, head, scratch):
            soft, hard, held = _rows(problem.soft, block), _rows(problem.hard, block), rows.held[block]
            rows.decide(row_state(z, problem.inv_tau, soft=soft, hard=hard, held=held), made, block)
        return True

    return move, look


def _logits_rows(problem: _Problem) -> tuple[Step, Step]:
    rows, inv_tau = problem.rows, problem.inv_tau
    z = rows.parameters
    count, vocabulary = z.shape
    dense = _dense(problem, Scratch(count, vocabulary, z.device))
    origin = _origin(problem)
    blocks = list(row_blocks(count, vocabulary))
    costly = not _kept(problem)

    def look(made: int, with_gradient: bool = False) -> bool:
        for block in blocks:
            state = row_state(
                z[block], inv_tau, soft=_rows(problem.soft, block), hard=_rows(problem.hard, block),
                gradient=dense(block) if with_gradient else None, origin=origin[block], held=rows.held[block],
            )  # fmt: skip
            rows.decide(state, made, block)
        return True

    def move(made: int) -> bool:
        look(made, with_gradient=True)
        if costly and not rows.moving(slice(None)):
            return False
        for block in blocks:
            rows.update_logits(made, block, dense(block), origin, _rows(problem.soft, block))
        return True

    return move, look


def _origin(problem: _Problem) -> Tensor:
    """G at the expected tokens (N,): rows that move have them, and all of G is taken relative to it."""
    gradient = from_factors(problem.gradient, problem.tables)
    return at_tokens(gradient, problem.tables.head, problem.rows.expected)


def _rows(x: Tensor | None, block: slice) -> Tensor | None:
    return None if x is None else x[block]


def _kept(problem: _Problem) -> bool:
    """Whether all of G is in memory from the first step to the last."""
    gradient, (vocabulary, _) = problem.gradient, problem.tables.head.weight.shape
    return isinstance(gradient, Tensor) or len(gradient.hidden) * vocabulary <= KEPT


def _dense(problem: _Problem, scratch: Scratch) -> Callable[[slice], Tensor]:
    """G of a block of rows: a slice of what there is or can be kept, else made when it is asked for."""
    gradient, tables = problem.gradient, problem.tables
    if isinstance(gradient, Tensor):
        return lambda block: gradient[block]
    if not _kept(problem):
        return lambda block: write_gradient(
            scratch.take("gradient", block.stop - block.start), gradient.rows(block), tables
        )
    count, vocabulary = len(gradient.hidden), scratch.vocabulary
    whole = torch.empty(count, vocabulary, dtype=torch.float32, device=scratch.device)
    for block in row_blocks(count, vocabulary):
        write_gradient(whole[block], gradient.rows(block), tables)
    return lambda block: whole[block]
