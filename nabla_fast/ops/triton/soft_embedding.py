"""`soft_embedding`: attention over the vocabulary, by blocks of rows: statistics, weights, product with the table.

Work: 2 N V d_k operations, and 2 N V d more from hidden states, whose logits are computed once; twice the former if
the logits or hidden states are float32 and the table is bfloat16 (`weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.operands import Head
from nabla_fast.ops.products import times_rows
from nabla_fast.ops.triton.blocks import Scratch, logits_in_blocks, row_blocks
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.weights import weight_dtypes, write_weights


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.soft_embedding`."""
    check(z, table)
    out, lse = _results(z, table)
    scratch = Scratch(len(z), len(table), z.device)
    for rows in row_blocks(len(z), len(table)):
        _mix(z[rows], table, 1.0 / tau, z.dtype, scratch, out[rows], lse[rows])
    return out, lse


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.linear_soft_embedding`."""
    check(h, head.weight, table)
    out, lse = _results(h, table)
    scratch = Scratch(len(h), len(table), h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        _mix(z, table, 1.0 / tau, h.dtype, scratch, out[rows], lse[rows])
    return out, lse


def _results(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(len(x), table.shape[1], dtype=torch.float32, device=x.device)
    return out, torch.empty(len(x), dtype=torch.float32, device=x.device)


def _mix(
    z: Tensor, table: Tensor, inv_tau: float, source: torch.dtype, scratch: Scratch, out: Tensor, lse: Tensor
) -> None:
    row = combine(row_state(z, inv_tau), inv_tau)
    weights = scratch.weights(len(z), weight_dtypes(source, table.dtype))
    write_weights(weights, z, inv_tau, "softmax", row.top, row.stats.max_prob)
    times_rows(weights, table, out)
    lse.copy_(row.stats.lse)
