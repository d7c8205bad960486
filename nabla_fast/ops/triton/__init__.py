"""The Triton back end: the operators of `nabla_fast.ops` without autograd, for CUDA tensors.

Importing it needs Triton; `TRITON_INTERPRET=1` in the environment, set before, makes it take CPU tensors instead.
"""

from nabla_fast.ops.triton.dto_step import dto_step
from nabla_fast.ops.triton.embedding import (
    linear_relaxed_backward,
    linear_soft_embedding,
    linear_soft_embedding_backward,
    linear_soft_embedding_recorded,
    linear_straight_through_embedding,
    relaxed_backward,
    soft_embedding,
    soft_embedding_backward,
    soft_embedding_recorded,
    straight_through_embedding,
)
from nabla_fast.ops.triton.gradient_norm import gradient_norm
from nabla_fast.ops.triton.likelihood import log_likelihood_gradient
from nabla_fast.ops.triton.stats import linear_relaxed_stats, relaxed_stats
from nabla_fast.ops.triton.token_diff import token_diff

__all__ = [
    "dto_step",
    "gradient_norm",
    "linear_relaxed_backward",
    "linear_relaxed_stats",
    "linear_soft_embedding",
    "linear_soft_embedding_backward",
    "linear_soft_embedding_recorded",
    "linear_straight_through_embedding",
    "log_likelihood_gradient",
    "relaxed_backward",
    "relaxed_stats",
    "soft_embedding",
    "soft_embedding_backward",
    "soft_embedding_recorded",
    "straight_through_embedding",
    "token_diff",
]
