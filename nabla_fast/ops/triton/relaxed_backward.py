"""`relaxed_backward`: dL/dz of the relaxation, by blocks of rows: G, statistics with <p, D>, dL/dz.

D is G less its value at the row's likeliest token. Traffic besides the products': z read three times, G written once
and read twice, dz written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.ops.triton.blocks import Scratch, at_argmax, rounded, row_blocks, write_terms
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.triton.weights import write_weights


def relaxed_backward(z: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """`reference.relaxed_backward`."""
    check(z, *vectors, *tables)
    dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    count, vocabulary = z.shape
    scratch = Scratch(count, vocabulary, z.device)
    vectors = rounded(vectors, tables, z.dtype)
    for rows in row_blocks(count, vocabulary):
        part = z[rows]
        gradient = write_terms(scratch.take("gradient", len(part)), [vector[rows] for vector in vectors], tables)
        origin = at_argmax(gradient, part)
        row = combine(row_state(part, 1.0 / tau, gradient=gradient, origin=origin), 1.0 / tau)
        write_weights(
            (dz[rows],), part, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, gradient=gradient, origin=origin,
            q=row.q,
        )  # fmt: skip
    return dz
