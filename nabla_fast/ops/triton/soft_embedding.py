"""`soft_embedding`: attention over the vocabulary, by blocks of rows: statistics, weights, product with the table.

Work: 2 N V d_k operations, and 2 N V d more from hidden states, whose logits are computed once; twice the former if
the logits or hidden states are float32 and the table is bfloat16 (`weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.products import times_rows
from nabla_fast.ops.triton.blocks import Scratch, logits_in_blocks, row_blocks
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.weights import weight_dtypes, write_weights
from nabla_fast.ops.types import Head


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.soft_embedding`."""
    check(z, table)
    out = z.new_empty(len(z), table.shape[1], dtype=torch.float32)
    scratch = Scratch(len(z), len(table), z.device)
    for rows in row_blocks(len(z), len(table)):
        _mix(z[rows], table, 1.0 / tau, z.dtype, scratch, out[rows])
    return out


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.linear_soft_embedding`."""
    check(h, head.weight, table)
    out = h.new_empty(len(h), table.shape[1], dtype=torch.float32)
    scratch = Scratch(len(h), len(table), h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        _mix(z, table, 1.0 / tau, h.dtype, scratch, out[rows])
    return out


def _mix(z: Tensor, table: Tensor, inv_tau: float, source: torch.dtype, scratch: Scratch, out: Tensor) -> None:
    row = combine(row_state(z, inv_tau), inv_tau)
    weights = scratch.weights(len(z), weight_dtypes(source, table.dtype))
    write_weights(weights, z, inv_tau, "softmax", row.top, row.stats.max_prob)
    times_rows(weights, table, out)
