"""The operators of DTO. `nabla_fast.ops.reference` says what each one means, `nabla_fast.ops.backends` who runs it."""

from nabla_fast.ops.backends import OPERATORS, availability, resolve
from nabla_fast.ops.objective import gradient_norm, linear_log_likelihood
from nabla_fast.ops.operands import Head, RelaxedStats, Tables, TokenGradient
from nabla_fast.ops.optimisation import dto_step, token_diff
from nabla_fast.ops.reference import linear_logits, row_chunks, scaled_and_capped, token_gradient, upcast
from nabla_fast.ops.relaxation import (
    linear_relaxed_stats,
    linear_soft_embedding,
    linear_straight_through_embedding,
    relaxed_stats,
    soft_embedding,
    straight_through_embedding,
)

__all__ = [
    "OPERATORS",
    "Head",
    "RelaxedStats",
    "Tables",
    "TokenGradient",
    "availability",
    "dto_step",
    "gradient_norm",
    "linear_log_likelihood",
    "linear_logits",
    "linear_relaxed_stats",
    "linear_soft_embedding",
    "linear_straight_through_embedding",
    "relaxed_stats",
    "resolve",
    "row_chunks",
    "scaled_and_capped",
    "soft_embedding",
    "straight_through_embedding",
    "token_diff",
    "token_gradient",
    "upcast",
]
