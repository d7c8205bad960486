"""`linear_relaxed_stats`: the head's product tile by tile, statistics on the fly, then a launch that merges the splits.

Work: 2 N V d operations, W read once per row block; no logit is written.
"""

from __future__ import annotations

from torch import Tensor

from nabla_fast.ops.operands import Head, RelaxedStats
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.sources import Logits


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats`."""
    check(h, head.weight)
    state, _ = linear_state(Logits(head, h=h), 1.0 / tau, entropy=True)
    return combine(state, 1.0 / tau, entropy_threshold, confidence_threshold).stats
