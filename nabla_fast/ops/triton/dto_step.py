"""`dto_step`: straight-through gradient, Adam, next hard token, for as long as a row's hard token stays the same.

A row that may not move is marked on the device, and the launches that follow find the mark and do nothing. Per step:

    few rows of latents   one pass over W (read once, from registers used twice), a merge of its parts, Adam
    rows of latents       by blocks of rows: logits, statistics with <p, D>, weights, their product with W; then Adam
    rows of logits        statistics with <p, D>, then dL/dz and Adam in one launch

with D = G - G(expected token): relative to it the gradient of a nearly certain token keeps its digits.
Products of the matrix library know no marks, so before a step with some the host looks which rows moved two steps ago
(`_dto_watch.py`): what stopped since is multiplied for nothing. Nothing else looks at the GPU. Work of a step for many
rows of latents, in units of 2 N V d: 3 with a bfloat16 head, 2 with a float32 one, and what G takes where it comes from
factors that are too many to keep its rows. Logits beside a bfloat16 head come from 16 bits of each latent, since they
decide the hard token; the weights of the head's rows are rounded to bfloat16, as in a model's own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._dto_one_row import fits, one_row_pass
from nabla_fast.ops.triton._dto_rows import Rows
from nabla_fast.ops.triton._dto_watch import Watch
from nabla_fast.ops.triton._gradient import at_tokens, from_factors
from nabla_fast.ops.triton._launch import check
from nabla_fast.ops.triton._matmul import Scratch, many_entries, write_gradient, write_logits
from nabla_fast.ops.triton._softmax import weight_dtypes, write_weights
from nabla_fast.ops.triton.stats import row_state
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, DTOStep, Tables, TokenGradient

# G is kept from step to step where it is no larger than so many scratches.
KEPT = 4


class _Problem(NamedTuple):
    """What a step needs besides the rows' flags."""

    rows: Rows
    gradient: Tensor | TokenGradient
    tables: Tables
    soft: Tensor | None
    hard: Tensor | None


# Makes step number ``made``, or says that no row moves; and takes the hard tokens of what the last step has left.
Steps = tuple[Callable[[int], bool], Callable[[int], None]]


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
    problem = _Problem(rows, gradient, tables, inputs.soft_noise, inputs.hard_noise)
    few = fits(len(parameters), [table.shape[1] for table in (tables.head.weight, *tables[1:3])])
    move, look = (_one_row if few else _latents_blocks)(problem) if latents else _logits_rows(problem)
    if all(move(made) for made in range(options.max_steps)):
        look(options.max_steps)
    state.step.add_(rows.made)
    return DTOStep(rows.current, (rows.current != state.tokens) | (rows.current < 0))


def _one_row(problem: _Problem) -> Steps:
    rows, tables = problem.rows, problem.tables
    gradient = from_factors(problem.gradient, tables)
    over, state, sums = one_row_pass(
        rows.parameters, tables.head, gradient, rows.expected, rows.inv_tau, problem.soft, problem.hard, rows.held
    )

    def look(made: int) -> None:
        over()
        rows.decide(state, made)

    def move(made: int) -> bool:
        look(made)
        rows.update_latents(sums, state, tables.head.scale, made)
        return True

    return move, look


def _latents_blocks(problem: _Problem) -> Steps:
    rows, head = problem.rows, problem.tables.head
    parameters = rows.parameters
    scratch = Scratch(len(parameters), len(head.weight), parameters.device, many_entries(parameters.device))
    dense, origin = _dense(problem, scratch), _origin(problem)
    (dtype,) = weight_dtypes(torch.bfloat16, head.weight.dtype)
    sums = torch.empty(1, *parameters.shape, dtype=torch.float32, device=parameters.device)
    watch = Watch(rows.held)

    def logits(made: int) -> Iterator[tuple[slice, Tensor]]:
        """Of the blocks that may move."""
        for block in scratch.blocks:
            if watch.moving(made, block):
                part = parameters[block]
                yield block, write_logits(scratch.take("logits", len(part)), part, head)

    def move(made: int) -> bool:
        if not watch.moving(made):
            return False
        for block, z in logits(made):
            g = dense(block)
            _look(problem, made, block, z, g, origin)
            row = rows.softmax._replace(origin=origin).rows(block)
            weights = write_weights(
                (scratch.take("weights", len(z), dtype),), z, rows.inv_tau, row, gradient=g,
                soft=_rows(problem.soft, block), held=rows.held[block], softcap=head.softcap,
            )  # fmt: skip
            times_rows(weights, head.weight, sums[0, block])
        rows.update_latents(sums, None, head.scale, made)
        watch.note(made)
        return True

    def look(made: int) -> None:
        for block, z in logits(made):
            _look(problem, made, block, z, None, origin)

    return move, look


def _logits_rows(problem: _Problem) -> Steps:
    rows = problem.rows
    z = rows.parameters
    scratch = Scratch(len(z), z.shape[1], z.device, many_entries(z.device))
    dense, origin = _dense(problem, scratch), _origin(problem)
    # Launches that find all rows held cost next to nothing, unless G is made for them.
    watch = None if _kept(problem, scratch) else Watch(rows.held)

    def look(made: int, with_gradient: bool = False) -> None:
        for block in scratch.blocks:
            _look(problem, made, block, z[block], dense(block) if with_gradient else None, origin)

    def move(made: int) -> bool:
        if watch is not None and not watch.moving(made):
            return False
        look(made, with_gradient=True)
        for block in scratch.blocks:
            rows.update_logits(made, block.start, dense(block), origin, _rows(problem.soft, block))
        if watch is not None:
            watch.note(made)
        return True

    return move, look


def _look(problem: _Problem, made: int, block: slice, z: Tensor, gradient: Tensor | None, origin: Tensor) -> None:
    """Statistics and hard tokens of a block's logits z (R, V)."""
    rows = problem.rows
    state = row_state(
        z, rows.inv_tau, soft=_rows(problem.soft, block), hard=_rows(problem.hard, block), gradient=gradient,
        origin=origin[block], held=rows.held[block],
    )  # fmt: skip
    rows.decide(state, made, block.start)


def _origin(problem: _Problem) -> Tensor:
    """G at the expected tokens (N,): rows that move have them, and all of G is taken relative to it."""
    gradient = from_factors(problem.gradient, problem.tables)
    return at_tokens(gradient, problem.tables.head, problem.rows.expected)


def _rows(x: Tensor | None, block: slice) -> Tensor | None:
    return None if x is None else x[block]


def _kept(problem: _Problem, scratch: Scratch) -> bool:
    """Whether all of G is in memory from the first step to the last."""
    gradient = problem.gradient
    return isinstance(gradient, Tensor) or len(gradient.hidden) * scratch.vocabulary <= KEPT * scratch.entries


def _dense(problem: _Problem, scratch: Scratch) -> Callable[[slice], Tensor]:
    """G of a block of rows: a slice of what there is or can be kept, else made when it is asked for."""
    gradient, tables = problem.gradient, problem.tables
    if isinstance(gradient, Tensor):
        return lambda block: gradient[block]
    if not _kept(problem, scratch):
        return lambda block: write_gradient(
            scratch.take("gradient", block.stop - block.start), gradient.rows(block), tables
        )
    whole = torch.empty(len(gradient.hidden), scratch.vocabulary, dtype=torch.float32, device=scratch.device)
    for block in scratch.blocks:
        write_gradient(whole[block], gradient.rows(block), tables)
    return lambda block: whole[block]
