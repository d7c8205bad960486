"""Statistics of the softmax relaxation, and the mask of rows worth optimizing."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from nabla_fast.ops import checks, reference
from nabla_fast.ops.registry import operator
from nabla_fast.ops.types import Head, RelaxedStats


@operator()
def relaxed_stats(
    z: Annotated[Tensor, "float N V"],
    tau: Annotated[float, checks.temperature] = 1.0,
    entropy_threshold: Annotated[float, checks.threshold] | None = None,
    confidence_threshold: Annotated[float, checks.threshold] | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """Statistics of ``softmax(z / tau)`` per row, from one read of z.

    Args:
        z: (N, V) logits, any float dtype, any strides.
        tau: relaxation temperature, above 0.
        entropy_threshold: nats; a row below it is masked out.
        confidence_threshold: a row whose largest probability is above it is masked out.
        backend: "auto" or a back end's name.

    Source: selection criteria of ∇-Reasoner (Alg. 3).
    """
    return reference.relaxed_stats(z, tau, entropy_threshold, confidence_threshold)


@operator()
def linear_relaxed_stats(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    tau: Annotated[float, checks.temperature] = 1.0,
    entropy_threshold: Annotated[float, checks.threshold] | None = None,
    confidence_threshold: Annotated[float, checks.threshold] | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """`relaxed_stats` of the logits of hidden states h (N, d), without an (N, V) tensor."""
    return reference.linear_relaxed_stats(h, head, tau, entropy_threshold, confidence_threshold)
