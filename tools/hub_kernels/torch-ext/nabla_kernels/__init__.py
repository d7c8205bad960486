"""Operators of ∇-Reasoner's optimization of token logits (DTO), by Triton kernels on a GPU and by PyTorch elsewhere.

N rows, V vocabulary entries, d hidden size. `Head` is a language model's output head, and none of the operators that
take one has an (N, V) tensor. See each function for its arguments; every one has ``backend``: "auto", "triton" or
"reference".
"""

from .dto_step import dto_step
from .embedding import (
    linear_relaxed_backward,
    linear_soft_embedding,
    linear_straight_through_embedding,
    relaxed_backward,
    soft_embedding,
    straight_through_embedding,
)
from .gradient_norm import gradient_norm
from .likelihood import linear_log_likelihood, log_likelihood_gradient
from .reference import linear_logits, token_gradient
from .rotary import rotary
from .stats import linear_relaxed_stats, relaxed_stats
from .token_diff import token_diff
from .types import (
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
    "rotary",
    "soft_embedding",
    "straight_through_embedding",
    "token_diff",
    "token_gradient",
]
