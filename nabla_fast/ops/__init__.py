"""The operators of DTO: `nabla_fast.ops.reference` defines them, `nabla_fast.ops.backends` chooses what runs them."""

from nabla_fast.ops.backends import OPERATORS, availability, resolve
from nabla_fast.ops.draw_token import draw_token
from nabla_fast.ops.dto_step import dto_step
from nabla_fast.ops.embedding import (
    linear_relaxed_backward,
    linear_soft_embedding,
    linear_straight_through_embedding,
    relaxed_backward,
    soft_embedding,
    straight_through_embedding,
)
from nabla_fast.ops.gradient_norm import gradient_norm
from nabla_fast.ops.likelihood import linear_log_likelihood, log_likelihood_gradient
from nabla_fast.ops.linear import token_gradient
from nabla_fast.ops.reference import linear_logits, row_chunks, scaled_and_capped, upcast
from nabla_fast.ops.stats import linear_relaxed_stats, relaxed_stats
from nabla_fast.ops.token_diff import token_diff
from nabla_fast.ops.types import (
    DTOInputs,
    DTOOptions,
    DTOState,
    DTOStep,
    HardEmbeddings,
    Head,
    LogLikelihood,
    RelaxedStats,
    Tables,
    TokenDiff,
    TokenGradient,
)

__all__ = [
    "OPERATORS",
    "DTOInputs",
    "DTOOptions",
    "DTOState",
    "DTOStep",
    "HardEmbeddings",
    "Head",
    "LogLikelihood",
    "RelaxedStats",
    "Tables",
    "TokenDiff",
    "TokenGradient",
    "availability",
    "draw_token",
    "dto_step",
    "gradient_norm",
    "linear_log_likelihood",
    "linear_logits",
    "linear_relaxed_backward",
    "linear_relaxed_stats",
    "linear_soft_embedding",
    "linear_straight_through_embedding",
    "log_likelihood_gradient",
    "relaxed_backward",
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
