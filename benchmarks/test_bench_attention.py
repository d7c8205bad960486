"""`attention`: of a gradient's queries behind a prompt on a CPU, with the derivative in queries, keys and values."""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting
from torch import Tensor
from torch.nn import functional

from nabla_fast.ops import native, token_layers
from nabla_fast.testing.operators import randn

# Query heads, heads of keys and features of a head.
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen2.5-0.5B": (14, 2, 64)}
PROMPT = 80
QUERIES = (32, 96, 256)
SCALE = 0.125


def both_ways(attend, q: Tensor, k: Tensor, v: Tensor, sent: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, mask.bool())
        return out.detach(), *torch.autograd.grad(out, leaves, sent)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers calls PyTorch."""
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, keys, values, mask, scale=SCALE)
    return out.transpose(1, 2).contiguous()


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return token_layers.attention_with_gradient(q, k, v, mask, SCALE)


def inputs(seed: int, queries: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    count, shared, size = heads
    columns = PROMPT + queries
    q, sent = (randn(1, queries, count, size, dtype=dtype, seed=seed + i) for i in (0, 1))
    k, v = (randn(1, shared, columns, size, dtype=dtype, seed=seed + i) for i in (2, 3))
    # Of numbers, as what is shared by all contenders is.
    mask = torch.ones(1, 1, queries, columns).tril(PROMPT)
    return Inputs((q.transpose(1, 2), k, v, sent), (mask,))


def contest(model: str, queries: int, dtype: torch.dtype) -> Contest:
    count, shared, size = HEADS[model]
    columns = PROMPT + queries
    reason = None if native.has("attention_blocks") else native.why_missing() or "the native library lacks it"
    # Read once and written once: queries, keys and values with their gradients, the result and what is sent to it.
    numbers = 2 * (count * queries + 2 * shared * columns) * size + 2 * count * queries * size
    return Contest(
        operator="attention",
        model=model,
        dtype=dtype,
        shape={"queries": queries, "columns": columns, "heads": count},
        inputs=functools.partial(inputs, queries=queries, heads=HEADS[model], dtype=dtype),
        meaning=functools.partial(both_ways, eager),
        ours={"native": functools.partial(both_ways, ours)} if reason is None else {},
        baselines={"eager": functools.partial(both_ways, eager)},
        traffic=numbers * dtype.itemsize,
        # Two products, and four in the derivative; of the causal half of the queries' own columns.
        flops=2 * 6 * count * queries * (PROMPT + queries // 2) * size,
        skipped={"torch.compile": "it calls the same attention"} | ({} if reason is None else {"native": reason}),
    )


def cases(setting: Setting) -> list[Case]:
    if setting.device.type != "cpu":
        return []
    sizes = [(model, queries, dtype) for model in HEADS for dtype in setting.dtypes for queries in QUERIES]
    return [contest(*size).case(setting) for size in (sizes[:2] if setting.quick else sizes)]


def test_attention(case, measured):
    measured(case)
