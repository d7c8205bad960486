"""The operators of DTO, and the choice between their back ends.

Every operator means what `nabla_fast.ops.reference` says. ``backend="auto"`` takes the fastest one that is built for
the tensor's device; a named back end that is not there is an error, never a quiet substitute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.reference import (
    Head,
    RelaxedStats,
    Tables,
    TokenGradient,
    dto_step,
    gradient_norm,
    hard_tokens,
    linear_log_likelihood,
    linear_logits,
    row_chunks,
    token_gradient,
    with_mask,
)

__all__ = [
    "Head",
    "RelaxedStats",
    "Tables",
    "TokenGradient",
    "dto_step",
    "gradient_norm",
    "hard_tokens",
    "linear_log_likelihood",
    "linear_logits",
    "linear_relaxed_stats",
    "relaxed_stats",
    "resolve_backend",
    "row_chunks",
    "token_diff",
    "token_gradient",
]


def resolve_backend(backend: str, device: torch.device) -> str:
    """The back end that runs: "reference" or "native".

    Args:
        backend: "auto", or a back end's name.
        device: where the tensors are.

    Raises:
        ValueError: if a named back end is unknown, not built, or not for this device; it says which can be used.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        return "native" if device.type == "cpu" and native.available() else "reference"
    if backend == "native":
        reason = "it runs on the CPU only" if device.type != "cpu" else native.why_missing()
        if reason is None:
            return backend
        raise ValueError(f"backend must be one that works on {device}, got 'native': {reason}; use 'auto'")
    raise ValueError(f"backend must be one of auto, reference, native, got {backend!r}, which this build does not have")


def relaxed_stats(
    z: Tensor,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """`reference.relaxed_stats` of logits z (N, V)."""
    if resolve_backend(backend, z.device) == "reference":
        return reference.relaxed_stats(z, tau, entropy_threshold, confidence_threshold)
    return with_mask(*native.relaxed_stats(z, tau), entropy_threshold, confidence_threshold)


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """`reference.linear_relaxed_stats` of hidden states h (N, d)."""
    parts = [
        relaxed_stats(linear_logits(h[rows], head), tau, entropy_threshold, confidence_threshold, backend)
        for rows in row_chunks(h.shape[0], head.weight.shape[0])
    ]
    return RelaxedStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def token_diff(old: Tensor, new: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`reference.token_diff` of token ids (B, m)."""
    chosen = native if resolve_backend(backend, old.device) == "native" else reference
    return chosen.token_diff(old, new)
