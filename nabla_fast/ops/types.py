"""Named tuples that operators take and return.

N rows, V vocabulary entries, d hidden size, e and r the widths of the language model's and the reward model's embedding
tables. ``Annotated[Tensor, "float N V"]`` is a tensor of one kind and shape; `nabla_fast.ops.arguments` says which
kinds there are, and turns these types into the schemas and checks of the operators.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from nabla_fast.ops import checks


class Head(NamedTuple):
    """The language model's output head: ``logits = softcap * tanh(scale * weight @ h / softcap)``.

    Attributes:
        weight: (V, d), any float dtype.
        scale: factor on the product (1 for most models).
        softcap: final-logit softcap c (Gemma-2); 0 means none.
    """

    weight: Annotated[Tensor, "float V d"]
    scale: Annotated[float, checks.finite] = 1.0
    softcap: Annotated[float, checks.at_least_zero] = 0.0


class Tables(NamedTuple):
    """The three tables that turn factors into a gradient over the vocabulary, and the likelihood's weight.

    Attributes:
        head: the output head, weight (V, d).
        embedding: (V, e) the language model's input embedding weight.
        reward_embedding: (V, r) the reward model's input embedding weight, in the language model's token order.
        nll_coeff: weight of the negative log-likelihood in the objective.
    """

    head: Head
    embedding: Annotated[Tensor, "float V e"]
    reward_embedding: Annotated[Tensor, "float V r"]
    nll_coeff: Annotated[float, checks.finite]


class TokenGradient(NamedTuple):
    """The gradient of the objective with respect to N one-hot tokens, as factors (identity (a) of the design).

        G(v) = -nll_coeff * logits(hidden)(v) + <embedding, E_v> + <reward_embedding, R_v>   (+ a constant over v)

    Attributes:
        hidden: (N, d) the language model's hidden state that predicts the token.
        embedding: (N, e) dL / d(row of the input embedding table E).
        reward_embedding: (N, r) dL / d(row of the reward model's embedding table R).
    """

    hidden: Annotated[Tensor, "float N d"]
    embedding: Annotated[Tensor, "float N e"]
    reward_embedding: Annotated[Tensor, "float N r"]

    def rows(self, index: slice | Tensor) -> TokenGradient:
        """The factors of some rows."""
        return TokenGradient(*(factor[index] for factor in self))


class RelaxedStats(NamedTuple):
    """Statistics of ``softmax(z / tau)`` per row.

    Attributes:
        max_prob: (N,) largest probability.
        lse: (N,) log-sum-exp of ``z / tau``.
        entropy: (N,) in nats.
        token: (N,) int64 argmax, the lowest index on a tie; -1 where the row holds NaN or +inf or is all -inf
            (the float statistics are NaN there).
        mask: (N,) bool, True where the row passes both thresholds: it is uncertain enough to be optimized.
    """

    max_prob: Annotated[Tensor, "sum N"]
    lse: Annotated[Tensor, "sum N"]
    entropy: Annotated[Tensor, "sum N"]
    token: Annotated[Tensor, "int64 N"]
    mask: Annotated[Tensor, "bool N"]


class HardEmbeddings(NamedTuple):
    """Embeddings of the rows' hard tokens.

    Attributes:
        embeddings: (N, d_k) per table, float32 or float64. The gradient that reaches the logits through them is that of
            the softmax relaxation (straight-through estimator). NaN for a row without an argmax.
        token: (N,) int64 argmax; -1 for a row without one.
    """

    embeddings: Annotated[list[Tensor], "sum N d_k", 2]
    token: Annotated[Tensor, "int64 N"]


class RecordedMixture(NamedTuple):
    """An embedding mixture, and what its gradient is made from.

    Attributes:
        mixture: (N, e) ``softmax(z / tau) @ table``.
        offset: (N, e) the mixture less the embedding of the likeliest token, as a sum over the other tokens: it keeps
            its digits where that token is nearly certain.
        top: (N,) the largest logit.
        max_prob: (N,) the largest probability, so that the softmax is ``exp((z - top) / tau) * max_prob``.
        token: (N,) int64 argmax; -1 for a row without one.
    """

    mixture: Annotated[Tensor, "sum N e"]
    offset: Annotated[Tensor, "constant N e"]
    top: Annotated[Tensor, "constant N"]
    max_prob: Annotated[Tensor, "constant N"]
    token: Annotated[Tensor, "int64 N"]


class LogLikelihood(NamedTuple):
    """The log-likelihood of one token per row.

    Attributes:
        log_likelihood: (N,) log softmax(logits(h))[token].
        gradient: (N, d) its gradient with respect to h; (0, d) where it was not asked for.
    """

    log_likelihood: Annotated[Tensor, "sum N"]
    gradient: Annotated[Tensor, "constant N*need_grad d"]


class TokenDiff(NamedTuple):
    """How two rows of token ids differ.

    Attributes:
        first: (B,) int64 first changed position, m where nothing changed.
        changes: (B,) int64 number of changed positions.
    """

    first: Annotated[Tensor, "int64 B"]
    changes: Annotated[Tensor, "int64 B"]


class DTOState(NamedTuple):
    """N rows that DTO optimizes, with the state of Adam.

    Attributes:
        parameters: (N, d) latents or (N, V) logits, float32 or float64; updated in place.
        exp_avg, exp_avg_sq: Adam's moments, shaped like ``parameters``; updated in place.
        step: (N,) int64, steps made so far; updated in place. A row makes no step past ``len(learning_rates)``.
        tokens: (N,) int64, the hard tokens at which the gradient was taken.
    """

    parameters: Annotated[Tensor, "parameters N w"]
    exp_avg: Annotated[Tensor, "parameters N w"]
    exp_avg_sq: Annotated[Tensor, "parameters N w"]
    step: Annotated[Tensor, "counts N"]
    tokens: Annotated[Tensor, "ids N"]


class DTOInputs(NamedTuple):
    """The inputs of DTO steps.

    Attributes:
        learning_rates: (S,) float32 or float64, of every step of the whole optimization.
        gradient: G, dense (N, V) or as factors.
        soft_noise: (N, V) added to the logits inside the softmax.
        hard_noise: (N, V) added to the logits where the hard token is taken.
        group: (N,) int64 in ascending order, which rows stop together; None lets every row go by itself.
    """

    learning_rates: Annotated[Tensor, "rates S"]
    gradient: Annotated[Tensor, "float N V"] | TokenGradient
    soft_noise: Annotated[Tensor, "noise N V"] | None = None
    hard_noise: Annotated[Tensor, "noise N V"] | None = None
    group: Annotated[Tensor, "ascending N"] | None = None


class DTOOptions(NamedTuple):
    """Settings of the steps of DTO.

    Attributes:
        latents: the rows are hidden states, with logits by the head; otherwise the rows are logits.
        tau: relaxation temperature.
        weight_decay: L2 penalty, as in ``torch.optim.Adam``.
        max_steps: most steps of this call.
    """

    latents: bool
    tau: Annotated[float, checks.temperature] = 1.0
    weight_decay: Annotated[float, checks.at_least_zero] = 0.0
    max_steps: Annotated[int, checks.at_least_zero] = 1


class DTOStep(NamedTuple):
    """The result of DTO steps.

    Attributes:
        token: (N,) int64, each row's hard token at its parameters as they are now; -1 where it has none.
        changed: (N,) bool, whether it is -1 or differs from the token at which the gradient was taken.
    """

    token: Annotated[Tensor, "int64 N"]
    changed: Annotated[Tensor, "bool N"]
