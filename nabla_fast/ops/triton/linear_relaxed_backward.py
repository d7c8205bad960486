"""`linear_relaxed_backward`: the relaxation's gradient carried on to hidden states, by chunks of the vocabulary.

Work in units of 2 N V d: logits twice, the gradient of every table that is not the head twice (one that is the head
shares the read of W), the product with W once. Scratch: (N, C) for a chunk of C entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nabla_fast.ops.operands import Head
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.sources import Logits, from_vectors
from nabla_fast.ops.triton.vocabulary_sum import sum_in_chunks
from nabla_fast.ops.triton.weights import write_weights


def linear_relaxed_backward(
    h: Tensor,
    head: Head,
    lse: Tensor,
    vectors: Sequence[Tensor],
    tables: Sequence[Tensor],
    tau: float = 1.0,
    mean: Tensor | None = None,
) -> Tensor:
    """`reference.linear_relaxed_backward`; it does not need ``mean``, which comes with the state of the logits."""
    check(h, head.weight, lse, *vectors, *tables)
    if not len(h):
        return h.new_empty(h.shape).float()
    logits = Logits(head, h=h)
    gradient = from_vectors(head, list(zip(vectors, tables, strict=True)))
    row = combine(linear_state(logits, 1.0 / tau, gradient)[0], 1.0 / tau)

    def write(chunk: Tensor, first: int) -> None:
        write_weights(
            chunk, logits, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, first=first, gradient=gradient, q=row.q
        )

    return sum_in_chunks(logits, head.weight, write).finish(head.scale)
