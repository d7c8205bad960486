"""`linear_relaxed_stats`: the head's product tile by tile, statistics on the fly, then a launch that merges the splits.

Work: 2 N V d operations, W read once per row block; no logit is written. Only where the matrix unit cannot take the
operands as they are do the logits of a block of rows lie in memory.
"""

from __future__ import annotations

from torch import Tensor

from nabla_fast.ops.triton.blocks import linear_row
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.types import Head, RelaxedStats


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats`."""
    check(h, head.weight)
    return linear_row(h, head, 1.0 / tau, entropy_threshold, confidence_threshold).stats
