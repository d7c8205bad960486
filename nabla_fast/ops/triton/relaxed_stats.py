"""`relaxed_stats`: one read of the logits, then a launch that merges the splits; entropy and mask come with it.

Traffic: N V logits read, 24 bytes per row and split written and read back.
"""

from __future__ import annotations

from torch import Tensor

from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check
from nabla_fast.ops.triton.rows import row_state
from nabla_fast.ops.types import RelaxedStats


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """`reference.relaxed_stats`."""
    check(z)
    state = row_state(z, 1.0 / tau, entropy=True)
    return combine(state, 1.0 / tau, entropy_threshold, confidence_threshold).stats
