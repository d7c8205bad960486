"""`soft_embedding`, forward and backward, from logits (N, V) and from hidden states (N, d)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import randn


def differentiated(forward: Callable[..., Tensor], x: Tensor, sent: Tensor, *tables: Any, **options: Any):
    """The mixture, and the gradient that ``sent`` (N, d) sends back to ``x``."""
    leaf = x.detach().requires_grad_()
    mixture = forward(leaf, *tables, **options)
    (gradient,) = torch.autograd.grad(mixture, leaf, sent.to(mixture.dtype))
    return mixture.detach(), gradient


def softmax_matmul(z: Tensor, table: Tensor) -> Tensor:
    return z.softmax(-1).to(table.dtype) @ table


def linear_softmax_matmul(h: Tensor, head: Head, table: Tensor) -> Tensor:
    return softmax_matmul(capped((h @ head.weight.T).float(), head.softcap), table)


def meaning(z: Tensor, sent: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return reference.soft_embedding(z, table), reference.relaxed_backward(z, [sent], [table])


def linear_meaning(h: Tensor, sent: Tensor, head: Head, table: Tensor) -> tuple[Tensor, Tensor]:
    mixture = reference.linear_soft_embedding(h, head, table)
    return mixture, reference.linear_relaxed_backward(h, head, [sent], [table])


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, linear: bool) -> Inputs:
    device = setting.device
    x = (
        randn(rows, shape.width, dtype=dtype, seed=seed, device=device)
        if linear
        else randn(rows, shape.vocabulary, dtype=dtype, seed=seed, scale=3.0, device=device)
    )
    sent = randn(rows, shape.width, seed=seed + 20, device=device)
    head = head_of(shape, dtype, seed + 100, device)
    table = head.weight if shape.tied else head_of(shape, dtype, seed + 200, device).weight
    return Inputs((x, sent), (head, table) if linear else (table,))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, linear: bool) -> Contest:
    operator = "linear_soft_embedding" if linear else "soft_embedding"
    fused, skipped = backends_of(operator, setting.device, getattr(ops, operator))
    dense, not_compiled = with_compiled(linear_softmax_matmul if linear else softmax_matmul, setting, shape.name)
    table = shape.vocabulary * shape.width * dtype.itemsize
    return Contest(
        operator=operator,
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype, linear=linear),
        meaning=linear_meaning if linear else meaning,
        ours={name: functools.partial(differentiated, f) for name, f in fused.items()},
        baselines={name: functools.partial(differentiated, f) for name, f in dense.items()},
        traffic=(table if shape.tied else 2 * table)
        if linear
        else table + 3 * rows * shape.vocabulary * dtype.itemsize,
        # One product forward and one backward; from hidden states, two more with the head.
        flops=2 * rows * shape.vocabulary * shape.width * (4 if linear else 2),
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    return [contest(setting, *sizes, linear).case(setting) for sizes in setting.grid for linear in (False, True)]


def test_soft_embedding(case, measured):
    measured(case)
