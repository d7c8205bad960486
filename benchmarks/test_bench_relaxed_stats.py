"""`relaxed_stats`: softmax statistics of logits (N, V)."""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, with_compiled
from shapes import QWEN3_4B, Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.testing.operators import randn


def fused(z: Tensor, backend: str) -> tuple[Tensor, ...]:
    return ops.relaxed_stats(z, backend=backend)[:4]


def textbook(z: Tensor) -> tuple[Tensor, ...]:
    p = torch.softmax(z, dim=-1)
    max_prob, token = p.max(dim=-1)
    return max_prob, torch.logsumexp(z, dim=-1), torch.special.entr(p).sum(-1), token


def fewest_passes(z: Tensor) -> tuple[Tensor, ...]:
    """What the compiler makes most of: the maximum and its index apart, one exponential."""
    largest = z.amax(dim=-1)
    x = z.float() - largest[:, None]
    e = x.exp()
    total = e.sum(-1)
    return 1 / total, largest + total.log(), total.log() - (e * x).sum(-1) / total, z.argmax(-1)


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Inputs:
    z = randn(rows, shape.vocabulary, dtype=dtype, seed=seed, scale=3.0, device=setting.device)
    return Inputs((z,), ())


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Contest:
    ours, skipped = backends_of("relaxed_stats", setting.device, fused)
    baselines, not_compiled = with_compiled(textbook, setting, shape.name)
    for name, function in with_compiled(fewest_passes, setting, shape.name)[0].items():
        baselines[f"{name}, fewest passes"] = function
    return Contest(
        operator="relaxed_stats",
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype),
        meaning=lambda z: reference.relaxed_stats(z)[:4],
        ours=ours,
        baselines=baselines,
        traffic=rows * shape.vocabulary * dtype.itemsize,
        flops=0,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    grid = list(setting.grid)
    if setting.device.type == "cuda" and not setting.quick:
        grid.append((QWEN3_4B, 8192, torch.bfloat16))  # the size for which other kernels' times are known
    return [contest(setting, *sizes).case(setting) for sizes in grid]


def test_relaxed_stats(case, measured):
    measured(case)
