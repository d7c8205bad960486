"""What operators take and give together: the output head, the tables, a gradient's factors, statistics of rows.

N rows, V vocabulary entries, d hidden size, d_r reward-model hidden size, as in `reference`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """The language model's output head: ``logits = softcap * tanh(scale * weight @ h / softcap)``.

    Attributes:
        weight: (V, d), any float dtype.
        scale: factor on the product (1 for most models).
        softcap: final-logit softcap c (Gemma-2); 0 means none.
    """

    weight: Tensor
    scale: float = 1.0
    softcap: float = 0.0


class RelaxedStats(NamedTuple):
    """Statistics of ``softmax(z / tau)`` per row.

    Attributes:
        max_prob: (N,) largest probability.
        lse: (N,) log-sum-exp of ``z / tau``.
        entropy: (N,) in nats.
        token: (N,) int64 argmax, the lowest index on a tie; -1 where the row holds NaN or +inf or is all -inf
            (the float statistics are NaN there).
        mask: (N,) bool, True where the row passes both thresholds: it is uncertain enough to be optimised.
    """

    max_prob: Tensor
    lse: Tensor
    entropy: Tensor
    token: Tensor
    mask: Tensor


class TokenGradient(NamedTuple):
    """The gradient of the objective with respect to N one-hot tokens, as factors (identity (a) of the design).

        G(v) = -nll_coeff * logits(hidden)(v) + <embedding, E_v> + <reward_embedding, R_v>   (+ a constant over v)

    Attributes:
        hidden: (N, d) the language model's hidden state that predicts the token.
        embedding: (N, d) dL / d(row of the input embedding table E).
        reward_embedding: (N, d_r) dL / d(row of the reward model's embedding table R).
    """

    hidden: Tensor
    embedding: Tensor
    reward_embedding: Tensor

    def rows(self, index: slice | Tensor) -> TokenGradient:
        """The factors of some rows."""
        return TokenGradient(*(factor[index] for factor in self))


class Tables(NamedTuple):
    """The three tables that turn factors into a gradient over the vocabulary, and the likelihood's weight.

    Attributes:
        head: the output head, weight (V, d).
        embedding: (V, d) the language model's input embedding weight.
        reward_embedding: (V, d_r) the reward model's input embedding weight, in the language model's token order.
        nll_coeff: weight of the negative log-likelihood in the objective.
    """

    head: Head
    embedding: Tensor
    reward_embedding: Tensor
    nll_coeff: float
