"""`linear_relaxed_stats`: softmax statistics of the logits of hidden states (N, d), the head's product included."""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, with_compiled
from shapes import Shape
from test_bench_relaxed_stats import textbook
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import randn


def fused(h: Tensor, head: Head, backend: str) -> tuple[Tensor, ...]:
    return ops.linear_relaxed_stats(h, head, backend=backend)[:4]


def dense(h: Tensor, head: Head) -> tuple[Tensor, ...]:
    return textbook(capped((h @ head.weight.T).float(), head.softcap))


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Inputs:
    h = randn(rows, shape.width, dtype=dtype, seed=seed, device=setting.device)
    return Inputs((h,), (head_of(shape, dtype, seed + 100, setting.device),))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Contest:
    ours, skipped = backends_of("linear_relaxed_stats", setting.device, fused)
    baselines, not_compiled = with_compiled(dense, setting, shape.name)
    return Contest(
        operator="linear_relaxed_stats",
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype),
        meaning=lambda h, head: reference.linear_relaxed_stats(h, head)[:4],
        ours=ours,
        baselines=baselines,
        traffic=(shape.vocabulary + rows) * shape.width * dtype.itemsize,
        flops=2 * rows * shape.vocabulary * shape.width,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    return [contest(setting, *sizes).case(setting) for sizes in setting.grid]


def test_linear_relaxed_stats(case, measured):
    measured(case)
