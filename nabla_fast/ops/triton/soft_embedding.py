"""`soft_embedding`: attention over the vocabulary, statistics first, then the weighted sum of the table's rows.

From logits in memory: z is read twice, the weights are made as they are used. From hidden states: the logits are
computed twice (statistics, weights), and the sum goes by chunks of the vocabulary (`vocabulary_sum`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.operands import Head
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.sources import Logits
from nabla_fast.ops.triton.vocabulary_sum import VocabularySum, sum_in_chunks
from nabla_fast.ops.triton.weights import write_weights


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.soft_embedding`."""
    check(z, table)
    row = combine(row_state(z, 1.0 / tau), 1.0 / tau)
    if not len(z):
        return table.new_empty(0, table.shape[1], dtype=torch.float32), row.stats.lse
    total = VocabularySum(z.shape[0], table, z.shape[1])
    total.add(z, 0, z.shape[1], softmax=(row.top, row.stats.max_prob, 1.0 / tau))
    return total.finish(), row.stats.lse


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.linear_soft_embedding`."""
    check(h, head.weight, table)
    logits = Logits(head, h=h)
    row = combine(linear_state(logits, 1.0 / tau)[0], 1.0 / tau)
    if not len(h):
        return table.new_empty(0, table.shape[1], dtype=torch.float32), row.stats.lse

    def write(chunk: Tensor, first: int) -> None:
        write_weights(chunk, logits, 1.0 / tau, "softmax", row.top, row.stats.max_prob, first=first)

    return sum_in_chunks(logits, table, write).finish(), row.stats.lse
