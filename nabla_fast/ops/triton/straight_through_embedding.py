# mypy: allow-untyped-defs, allow-incomplete-defs
"""`straight_through_embedding`: the row statistics' pass, then a gather of the hard tokens' embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.blocks import linear_row
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check, run, strides
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.types import HardEmbeddings, Head


@triton.jit
def _gather_kernel(TABLE, T_v, T_d, TOKEN, OUT, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    token = tl.load(TOKEN + row)
    at = TABLE + tl.maximum(token, 0) * T_v + depth.to(tl.int64) * T_d
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * D + depth, tl.where(token < 0, float("nan"), value), mask=inside)


def _gather(table: Tensor, token: Tensor) -> Tensor:
    out = torch.empty(token.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    if out.numel():
        run(
            _gather_kernel, (out.shape[0], triton.cdiv(out.shape[1], 1024)), out.device,
            TABLE=table, **strides("T", table, "vd"), TOKEN=token, OUT=out, D=out.shape[1], BD=1024, num_warps=4,
        )  # fmt: skip
    return out


def _embeddings(token: Tensor, tables: Sequence[Tensor]) -> HardEmbeddings:
    return HardEmbeddings([_gather(table, token) for table in tables], token)


def straight_through_embedding(z: Tensor, tables: Sequence[Tensor], tau: float = 1.0) -> HardEmbeddings:
    """`reference.straight_through_embedding`; a row without meaning has token -1 and NaN embeddings."""
    check(z, *tables)
    return _embeddings(combine(row_state(z, 1.0 / tau), 1.0 / tau).stats.token, tables)


def linear_straight_through_embedding(
    h: Tensor, head: Head, tables: Sequence[Tensor], tau: float = 1.0
) -> HardEmbeddings:
    """`reference.linear_straight_through_embedding`."""
    check(h, head.weight, *tables)
    return _embeddings(linear_row(h, head, 1.0 / tau).stats.token, tables)
