"""`straight_through_embedding`, forward and backward, from logits (N, V) and from hidden states (N, d)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import randn


def differentiated(forward: Callable[..., Any], x: Tensor, first: Tensor, second: Tensor, *others: Any, **options: Any):
    """Both embeddings, the tokens, and the gradient that ``first`` and ``second`` (N, d_k) send back to ``x``."""
    leaf = x.detach().requires_grad_()
    embeddings, token = forward(leaf, *others, **options)
    sent = [grad.to(embedding.dtype) for grad, embedding in zip((first, second), embeddings, strict=True)]
    (gradient,) = torch.autograd.grad(embeddings, leaf, sent)
    return *(embedding.detach() for embedding in embeddings), token, gradient


def one_hot_matmul(z: Tensor, tables: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The straight-through estimator as it is usually written: dense one-hot rows through both tables."""
    p = z.softmax(-1)
    token = z.argmax(-1)
    y = F.one_hot(token, z.shape[-1]).to(p.dtype) + p - p.detach()
    return [y.to(table.dtype) @ table for table in tables], token


def linear_one_hot_matmul(h: Tensor, head: Head, tables: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    return one_hot_matmul(capped((h @ head.weight.T).float(), head.softcap), tables)


def meaning(z: Tensor, first: Tensor, second: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    embeddings, token = reference.straight_through_embedding(z, tables)
    return *embeddings, token, reference.relaxed_backward(z, [first, second], tables)


def linear_meaning(
    h: Tensor, first: Tensor, second: Tensor, head: Head, tables: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    embeddings, token = reference.linear_straight_through_embedding(h, head, tables)
    return *embeddings, token, reference.linear_relaxed_backward(h, head, [first, second], tables)


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, linear: bool) -> Inputs:
    device = setting.device
    widths = (shape.width, shape.reward_width)
    x = (
        randn(rows, shape.width, dtype=dtype, seed=seed, device=device)
        if linear
        else randn(rows, shape.vocabulary, dtype=dtype, seed=seed, scale=3.0, device=device)
    )
    grads = tuple(randn(rows, d, seed=seed + 20 + i, device=device) for i, d in enumerate(widths))
    head = head_of(shape, dtype, seed + 100, device)
    embedding = head.weight if shape.tied else head_of(shape, dtype, seed + 200, device).weight
    reward = randn(shape.vocabulary, shape.reward_width, dtype=dtype, seed=seed + 300, scale=0.02, device=device)
    return Inputs((x, *grads), (head, [embedding, reward]) if linear else ([embedding, reward],))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, linear: bool) -> Contest:
    operator = "linear_straight_through_embedding" if linear else "straight_through_embedding"
    fused, skipped = backends_of(operator, setting.device, getattr(ops, operator))
    dense, not_compiled = with_compiled(linear_one_hot_matmul if linear else one_hot_matmul, setting, shape.name)
    widths = shape.width + shape.reward_width
    tables = shape.vocabulary * widths * dtype.itemsize
    head = 0 if shape.tied else shape.vocabulary * shape.width * dtype.itemsize
    # Backward: one product with the tables. From hidden states, one with the head forward and one back to them.
    products = widths + 2 * shape.width if linear else widths
    return Contest(
        operator=operator,
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width, "d_r": shape.reward_width},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype, linear=linear),
        meaning=linear_meaning if linear else meaning,
        ours={name: functools.partial(differentiated, f) for name, f in fused.items()},
        baselines={name: functools.partial(differentiated, f) for name, f in dense.items()},
        # Logits are read forward and backward, and their gradient is written.
        traffic=tables + head if linear else tables + 3 * rows * shape.vocabulary * dtype.itemsize,
        flops=2 * rows * shape.vocabulary * products,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    return [contest(setting, *sizes, linear).case(setting) for sizes in setting.grid for linear in (False, True)]


def test_straight_through_embedding(case, measured):
    measured(case)
