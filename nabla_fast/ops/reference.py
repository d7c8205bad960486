"""What every operator means, in plain PyTorch. Other back ends are tested against this file.

Rows are flattened sequences: N rows, V vocabulary entries, d hidden size, d_r reward-model hidden size.
Half-precision inputs are upcast, so sums and logits are float32 (float64 for float64 inputs) and never rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a (rows, V) temporary that one chunk may hold, in elements (256 MiB of float32).
_CHUNK_ELEMENTS = 2**26


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


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def linear_logits(h: Tensor, head: Head) -> Tensor:
    """Logits (N, V), float32 or float64, of hidden states h (N, d)."""
    weight = head.weight
    if h.is_cuda and h.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(h, weight.T, out_dtype=torch.float32)
    else:
        dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
        product = h.to(dtype) @ weight.T.to(dtype)
    if head.scale != 1.0:
        product = product * head.scale
    return torch.tanh(product / head.softcap) * head.softcap if head.softcap else product


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """Softmax statistics of logits z (N, V) at temperature tau, and the mask of rows worth optimising.

    Source: selection criteria of ∇-Reasoner (Alg. 3): entropy >= entropy_threshold, max_prob <= confidence_threshold.
    """
    x = upcast(z) / tau
    lse = torch.logsumexp(x, dim=-1)
    log_p = x - lse.unsqueeze(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, torch.where(p.isnan(), p, 0.0)).sum(-1)
    bad = ~lse.isfinite()
    nan = torch.full_like(lse, math.nan)
    max_prob, lse, entropy = (torch.where(bad, nan, value) for value in (p.amax(-1), lse, entropy))
    token = torch.where(bad, -1, x.argmax(-1))
    return with_mask(max_prob, lse, entropy, token, entropy_threshold, confidence_threshold)


def with_mask(
    max_prob: Tensor,
    lse: Tensor,
    entropy: Tensor,
    token: Tensor,
    entropy_threshold: float | None,
    confidence_threshold: float | None,
) -> RelaxedStats:
    """Adds the mask to a row's statistics. A row that could not be read (token -1) never passes."""
    mask = token >= 0
    if entropy_threshold is not None:
        mask = mask & (entropy >= entropy_threshold)
    if confidence_threshold is not None:
        mask = mask & (max_prob <= confidence_threshold)
    return RelaxedStats(max_prob, lse, entropy, token, mask)


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`relaxed_stats` of the logits of hidden states h (N, d); in row chunks, so no (N, V) tensor is kept."""
    parts = [
        relaxed_stats(linear_logits(h[rows], head), tau, entropy_threshold, confidence_threshold)
        for rows in row_chunks(h.shape[0], head.weight.shape[0])
    ]
    return RelaxedStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def linear_log_likelihood(h: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """log softmax(logits(h))[token] per row: (N,), differentiable with respect to h.

    Args:
        h: (N, d) hidden states.
        head: output head.
        tokens: (N,) int64.
    """
    logits = linear_logits(h, head)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def token_gradient(factors: TokenGradient, tables: Tables) -> Tensor:
    """The gradient over the vocabulary (N, V), up to a constant per row, which DTO does not see."""
    gradient = -tables.nll_coeff * linear_logits(factors.hidden, tables.head)
    for vector, table in (
        (factors.embedding, tables.embedding),
        (factors.reward_embedding, tables.reward_embedding),
    ):
        gradient += upcast(vector).to(gradient.dtype) @ upcast(table).T.to(gradient.dtype)
    return gradient


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """L2 norm of the token gradient per row (N,), the log-sum-exp of the likelihood included (Alg. 3)."""
    norms = []
    for rows in row_chunks(factors.hidden.shape[0], tables.head.weight.shape[0]):
        part = factors.rows(rows)
        gradient = token_gradient(part, tables)
        if tables.nll_coeff:
            lse = torch.logsumexp(linear_logits(part.hidden, tables.head), dim=-1, keepdim=True)
            gradient = gradient + tables.nll_coeff * lse
        norms.append(gradient.norm(dim=-1))
    return torch.cat(norms)


def dto_step(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    learning_rate: float,
    gradient: Tensor | TokenGradient,
    tables: Tables,
    *,
    latents: bool,
    tau: float = 1.0,
    weight_decay: float = 0.0,
    soft_noise: Tensor | None = None,
    hard_noise: Tensor | None = None,
) -> Tensor:
    """One DTO step (Alg. 2) of N rows: straight-through backward, Adam, next hard token.

        p = softmax((z + soft_noise) / tau)      dL/dz = p * (G - <p, G>) / tau      dL/dh = d(logits)/dh^T dL/dz

    Args:
        parameters: (N, d) latents or (N, V) logits, float32 or float64; updated in place.
        exp_avg, exp_avg_sq: Adam's moments, shaped like ``parameters``; updated in place.
        step: 1 for the first step (Adam's bias correction).
        learning_rate: of this step.
        gradient: G, dense (N, V) or as factors.
        tables: head and embedding tables.
        latents: the rows are hidden states, with logits by ``tables.head``; otherwise the rows are logits.
        tau: relaxation temperature.
        weight_decay: L2 penalty, as in ``torch.optim.Adam``.
        soft_noise: (N, V) added to the logits inside the softmax.
        hard_noise: (N, V) added to the logits where the hard token is taken.

    Returns:
        (N,) int64, the hard token of each row after the step.
    """
    tokens = []
    for rows in row_chunks(parameters.shape[0], tables.head.weight.shape[0]):
        row = parameters[rows]
        dense = token_gradient(gradient.rows(rows), tables) if isinstance(gradient, TokenGradient) else gradient[rows]
        z = linear_logits(row, tables.head) if latents else row
        dz = _straight_through_backward(z, dense, tau, None if soft_noise is None else soft_noise[rows])
        grad = _head_backward(dz, z, tables.head).to(row.dtype) if latents else dz
        _adam(row, exp_avg[rows], exp_avg_sq[rows], grad, step, learning_rate, weight_decay)
        tokens.append(hard_tokens(row, tables.head, latents, None if hard_noise is None else hard_noise[rows]))
    return torch.cat(tokens)


def hard_tokens(parameters: Tensor, head: Head, latents: bool, hard_noise: Tensor | None = None) -> Tensor:
    """argmax of the rows' logits plus ``hard_noise``: (N,) int64."""
    z = linear_logits(parameters, head) if latents else parameters
    return (z if hard_noise is None else z + hard_noise).argmax(-1)


def token_diff(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """First changed position and number of changed positions per row.

    Args:
        old, new: (B, m) int64.

    Returns:
        (B,) int64 first changed position, m where nothing changed; (B,) int64 count.
    """
    changed = old != new
    count = changed.sum(-1)
    if old.shape[-1] == 0:
        return torch.zeros_like(count), count
    first = torch.where(count > 0, changed.int().argmax(-1), old.shape[-1])
    return first, count


def row_chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of rows whose (rows, V) temporaries stay within a fixed budget; one empty slice for no rows."""
    size = max(1, _CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _straight_through_backward(z: Tensor, gradient: Tensor, tau: float, noise: Tensor | None) -> Tensor:
    p = torch.softmax((z if noise is None else z + noise) / tau, dim=-1)
    # 0 * inf would be NaN where a -inf logit meets an infinite gradient; such entries cannot move.
    pg = torch.where(p > 0, p * gradient, 0.0)
    return (pg - p * pg.sum(-1, keepdim=True)) / tau


def _head_backward(dz: Tensor, z: Tensor, head: Head) -> Tensor:
    if head.softcap:
        dz = dz * (1 - (z / head.softcap) ** 2)
    return head.scale * (dz @ upcast(head.weight).to(dz.dtype))


def _adam(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    if weight_decay:
        grad = grad + weight_decay * parameters
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    parameters.addcdiv_(exp_avg, denominator, value=-learning_rate / (1 - betas[0] ** step))
