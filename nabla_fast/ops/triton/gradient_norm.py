"""`gradient_norm`: mean and squared deviations of G, and the log-sum-exp, in one pass over the tables.

Work: 2 N V (d + d_r) operations with tied embeddings, 2 N V (2 d + d_r) else; the head's and E's share the read of W.
"""

from __future__ import annotations

from torch import Tensor

from nabla_fast.ops.operands import Tables, TokenGradient
from nabla_fast.ops.triton.combine import combine_norm
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.sources import Logits, from_factors


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """`reference.gradient_norm`."""
    check(*factors, tables.head.weight, tables.embedding, tables.reward_embedding)
    logits = Logits(tables.head, h=factors.hidden)
    state, size = linear_state(logits, 1.0, from_factors(factors, tables, own=True), moments=True)
    return combine_norm(state, size, logits.vocabulary, tables.nll_coeff)
