"""The gradient criterion: the norm of a token gradient, which is never made whole."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.registry import operator
from nabla_fast.ops.types import Tables, TokenGradient


@operator()
def gradient_norm(factors: TokenGradient, tables: Tables, backend: str = "auto") -> Annotated[Tensor, "sum N"]:
    """L2 norm (N,) of the token gradient over the vocabulary, from its factors.

    float32, float64 where a factor or table is. NaN for a row that holds NaN or infinite values. The log-sum-exp of the
    likelihood, a constant over the vocabulary that the factors leave out, is part of it.

    Source: the gradient criterion of ∇-Reasoner (Alg. 3).
    """
    return reference.gradient_norm(factors, tables)
