"""`gradient_norm`: the norm over the vocabulary of gradients that are kept as factors."""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Tables, TokenGradient
from nabla_fast.testing.operators import factors, tables


def fused(hidden: Tensor, embedding: Tensor, reward_embedding: Tensor, where: Tables, backend: str) -> Tensor:
    return ops.gradient_norm(TokenGradient(hidden, embedding, reward_embedding), where, backend=backend)


def dense(hidden: Tensor, embedding: Tensor, reward_embedding: Tensor, where: Tables) -> Tensor:
    """The gradient as an (N, V) tensor, and its norm."""
    log_pi = capped((hidden @ where.head.weight.T).float(), where.head.softcap).log_softmax(-1)
    gradient = embedding @ where.embedding.T + reward_embedding @ where.reward_embedding.T
    return (gradient.float() - where.nll_coeff * log_pi).norm(dim=-1)


def meaning(hidden: Tensor, embedding: Tensor, reward_embedding: Tensor, where: Tables) -> Tensor:
    return reference.gradient_norm(TokenGradient(hidden, embedding, reward_embedding), where)


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Inputs:
    own = head_of(shape, dtype, seed + 100, setting.device)
    options = {"dtype": dtype, "device": setting.device}
    where = tables(shape.vocabulary, shape.width, shape.reward_width, own, tied=shape.tied, **options)
    return Inputs(tuple(factors(rows, shape.width, shape.reward_width, seed=seed, **options)), (where,))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Contest:
    ours, skipped = backends_of("gradient_norm", setting.device, fused)
    baselines, not_compiled = with_compiled(dense, setting, shape.name)
    # Tied, hidden state and embedding gradient are one vector before they meet the table, if there is no softcap.
    merged = shape.tied and not shape.softcap
    read = shape.width * (1 if shape.tied else 2) + shape.reward_width
    multiplied = shape.width * (1 if merged else 2) + shape.reward_width
    return Contest(
        operator="gradient_norm",
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width, "d_r": shape.reward_width},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype),
        meaning=meaning,
        ours=ours,
        baselines=baselines,
        traffic=shape.vocabulary * read * dtype.itemsize,
        flops=2 * rows * shape.vocabulary * multiplied,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    return [contest(setting, *sizes).case(setting) for sizes in setting.grid]


def test_gradient_norm(case, measured):
    measured(case)
