"""`linear_relaxed_backward`: the relaxation's gradient carried on to hidden states, by blocks of rows.

Work in units of 2 N V d: logits, the gradient of every table, the product with W once each; twice that for float32
hidden states beside bfloat16 tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.ops.operands import Head
from nabla_fast.ops.products import times_rows
from nabla_fast.ops.triton.blocks import Scratch, at_argmax, logits_in_blocks, rounded, write_terms
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.weights import weight_dtypes, write_weights


def linear_relaxed_backward(
    h: Tensor, head: Head, lse: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`reference.linear_relaxed_backward`."""
    check(h, head.weight, lse, *vectors, *tables)
    out = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    scratch = Scratch(len(h), head.weight.shape[0], h.device)
    vectors = rounded(vectors, tables, h.dtype)
    for rows, z in logits_in_blocks(h, head, scratch):
        gradient = write_terms(scratch.take("gradient", len(z)), [vector[rows] for vector in vectors], tables)
        origin = at_argmax(gradient, z)
        row = combine(row_state(z, 1.0 / tau, gradient=gradient, origin=origin), 1.0 / tau)
        weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
        write_weights(
            weights, z, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, gradient=gradient,
            origin=origin, q=row.q, softcap=head.softcap,
        )  # fmt: skip
        times_rows(weights, head.weight, out[rows], alpha=head.scale)
    return out
