# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding of queries and keys in one launch: a program for each token and 16 heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import check, launch

_HEADS = 16


@triton.jit
def _rotate(
    X, X_b, X_h, X_s, X_d, OUT, OUT_b, OUT_h, OUT_s, OUT_d, c1, c2, s1, s2, b, s, first, heads, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    h = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    d = tl.arange(0, HALF)[None, :]
    inside = (h < heads) & (d < half)
    at = X + b * X_b + h * X_h + s * X_s + d * X_d
    x1 = tl.load(at, mask=inside, other=0.0)
    x2 = tl.load(at + half * X_d, mask=inside, other=0.0)
    # Products are rounded to the dtype of the tensors, as those of the model are.
    kind = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    if INVERSE:
        y1 = (x1 * c1).to(kind).to(tl.float32) + (x2 * s2).to(kind).to(tl.float32)
        y2 = (x2 * c2).to(kind).to(tl.float32) - (x1 * s1).to(kind).to(tl.float32)
    else:
        y1 = (x1 * c1).to(kind).to(tl.float32) - (x2 * s1).to(kind).to(tl.float32)
        y2 = (x2 * c2).to(kind).to(tl.float32) + (x1 * s2).to(kind).to(tl.float32)
    out = OUT + b * OUT_b + h * OUT_h + s * OUT_s + d * OUT_d
    tl.store(out, y1.to(kind), mask=inside)
    tl.store(out + half * OUT_d, y2.to(kind), mask=inside)


@triton.jit(do_not_specialize=["tokens", "C_b", "S_b"])
def _rotary_kernel(
    Q, Q_b, Q_h, Q_s, Q_d, K, K_b, K_h, K_s, K_d, COS, C_b, C_s, C_d, SIN, S_b, S_s, S_d,
    QO, QO_b, QO_h, QO_s, QO_d, KO, KO_b, KO_h, KO_s, KO_d, tokens, q_heads, k_heads, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // tokens, row % tokens
    part = tl.program_id(1)
    d = tl.arange(0, HALF)[None, :]
    cos, sin = COS + b * C_b + s * C_s + d * C_d, SIN + b * S_b + s * S_s + d * S_d
    c1 = tl.load(cos, mask=d < half, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half * C_d, mask=d < half, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=d < half, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half * S_d, mask=d < half, other=0.0).to(tl.float32)
    of_queries = tl.cdiv(q_heads, HEADS)
    if part < of_queries:
        _rotate(Q, Q_b, Q_h, Q_s, Q_d, QO, QO_b, QO_h, QO_s, QO_d, c1, c2, s1, s2, b, s, part * HEADS, q_heads, half,
                INVERSE, HEADS, HALF)  # fmt: skip
    else:
        _rotate(K, K_b, K_h, K_s, K_d, KO, KO_b, KO_h, KO_s, KO_d, c1, c2, s1, s2, b, s, (part - of_queries) * HEADS,
                k_heads, half, INVERSE, HEADS, HALF)  # fmt: skip


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`nabla_fast.ops.rotary.rotary`, or with ``inverse`` its transposed, the backward pass."""
    check(q, k, cos, sin)
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    batch, q_heads, tokens, width = q.shape
    half, k_heads = width // 2, k.shape[1]
    parts = triton.cdiv(q_heads, _HEADS) + triton.cdiv(k_heads, _HEADS)
    if batch and tokens:
        # One table for all rows of the batch, often.
        tables = [x for table in (cos, sin) for x in (table, table.stride(0) * (len(table) > 1), *table.stride()[1:])]
        launch(
            _rotary_kernel, (batch * tokens, parts), q.device,
            (
                q, *q.stride(), k, *k.stride(), *tables, out_q, *out_q.stride(), out_k, *out_k.stride(),
                tokens, q_heads, k_heads, half,
            ),
            {"INVERSE": inverse, "HEADS": _HEADS, "HALF": triton.next_power_of_2(half)}, enable_fp_fusion=False,
        )  # fmt: skip
    return out_q, out_k
