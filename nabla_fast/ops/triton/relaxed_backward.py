"""`relaxed_backward`: dL/dz of the relaxation. One pass for <p, G>, one that writes dz; G is computed in both.

Traffic: z read twice, dz written once, each table read twice per row block; 4 N V sum(d_k) operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.sources import Logits, from_vectors
from nabla_fast.ops.triton.weights import write_weights


def relaxed_backward(
    z: Tensor, lse: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`reference.relaxed_backward`."""
    check(z, lse, *vectors, *tables)
    logits = Logits(z=z)
    gradient = from_vectors(None, list(zip(vectors, tables, strict=True)))
    # <p, G> comes with the same pass that finds the maximum again, more exactly than lse has it at small tau.
    row = combine(linear_state(logits, 1.0 / tau, gradient)[0], 1.0 / tau)
    dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    if len(z):
        write_weights(
            dz, logits, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, gradient=gradient, q=row.q
        )  # fmt: skip
    return dz
