"""The definition of every operator in plain PyTorch, which other back ends are tested against.

Rows are flattened sequences: N rows, V vocabulary entries, d hidden size, d_r reward-model hidden size.
Half-precision inputs are upcast, so sums and logits are float32 (float64 where any float input of the operator is) and
never rounded.

A row that holds NaN or +inf, or nothing but -inf, has no meaning: its floats and gradients are NaN, its token is -1,
its mask False, and it makes no step. Nothing is indexed with an id outside the vocabulary; `checks` says what raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_fast.ops import table_matmul
from nabla_fast.ops.noise import MASK, with_noise
from nabla_fast.ops.types import (
    DTOInputs,
    DTOOptions,
    DTOState,
    DTOStep,
    HardEmbeddings,
    Head,
    LogLikelihood,
    RecordedMixture,
    RelaxedStats,
    Tables,
    TokenDiff,
    TokenGradient,
)
from nabla_fast.ops.warp import warp

# Rows of a (rows, V) temporary that one chunk may hold, in elements (256 MiB of float32).
_CHUNK_ELEMENTS = 2**26


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def linear_logits(h: Tensor, head: Head, least: torch.dtype = torch.float32) -> Tensor:
    """Logits (N, V) of hidden states h (N, d): float32, or float64 where h, the head or ``least`` is."""
    return scaled_and_capped(times_table(h, head.weight, least), head)


def times_table(x: Tensor, table: Tensor, least: torch.dtype = torch.float32) -> Tensor:
    """x @ table.T (N, V), float32 or float64."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, table.dtype), least)
    if x.is_cuda and dtype == torch.float32 != table.dtype:  # without a copy of the table in float32
        return table_matmul.times_table(x, table, x.new_empty(len(x), len(table), dtype=dtype))
    return x.to(dtype) @ table.T.to(dtype)


def scaled_and_capped(product: Tensor, head: Head) -> Tensor:
    """Logits (N, V) of products h W^T (N, V)."""
    if head.scale != 1.0:
        product = product * head.scale
    return torch.tanh(product / head.softcap) * head.softcap if head.softcap else product


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """Softmax statistics of logits z (N, V) at temperature tau, and the mask of rows worth optimizing.

    Source: selection criteria of ∇-Reasoner (Alg. 3): entropy >= entropy_threshold, max_prob <= confidence_threshold.
    """
    x, top = _relative(z, tau)
    log_p = torch.log_softmax(x, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, torch.where(p.isnan(), p, 0.0)).sum(-1)
    max_prob, token = p.amax(-1), hard_token(z)
    mask = token >= 0
    if entropy_threshold is not None:
        mask = mask & (entropy >= entropy_threshold)
    if confidence_threshold is not None:
        mask = mask & (max_prob <= confidence_threshold)
    return RelaxedStats(max_prob, torch.logsumexp(x, dim=-1) + top / tau, entropy, token, mask)


def _relative(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """``(z - max z) / tau`` (N, V), float32 or float64, and max z (N,). All NaN for a row without meaning."""
    z = upcast(z)
    top = z.amax(-1)
    return (z - torch.where(top.isfinite(), top, torch.nan).unsqueeze(-1)) / tau, top


def hard_token(z: Tensor) -> Tensor:
    """argmax (N,) int64 of logits (N, V), the lowest index on a tie; -1 for a row without meaning."""
    return torch.where(z.amax(-1).isfinite(), z.argmax(-1), -1)


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


def straight_through_embedding(z: Tensor, tables: Sequence[Tensor], tau: float = 1.0) -> HardEmbeddings:
    """Embeddings of the hard tokens; `relaxed_backward` is the gradient, that of ``softmax(z / tau) @ table``."""
    dtype = functools.reduce(torch.promote_types, (table.dtype for table in tables), upcast(z).dtype)
    token = hard_token(z)
    bad, rows = (token < 0).unsqueeze(-1), token.clamp(min=0)
    embeddings = [torch.where(bad, torch.nan, table[rows].to(dtype)) for table in tables]
    return HardEmbeddings(embeddings, token)


def linear_straight_through_embedding(
    h: Tensor, head: Head, tables: Sequence[Tensor], tau: float = 1.0
) -> HardEmbeddings:
    """`straight_through_embedding` of the logits of hidden states h (N, d); see `linear_relaxed_backward`."""
    return straight_through_embedding(linear_logits(h, head), tables, tau)


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> Tensor:
    """The embedding mixture ``softmax(z / tau) @ table`` (N, e); `relaxed_backward` is its gradient."""
    z = z.to(torch.promote_types(upcast(z).dtype, table.dtype))
    p = torch.softmax(_relative(z, tau)[0], dim=-1)
    return p @ table.to(p.dtype)


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> Tensor:
    """`soft_embedding` of the logits of hidden states h (N, d): attention over the vocabulary."""
    return soft_embedding(linear_logits(h, head), table, tau)


def linear_soft_embedding_recorded(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> RecordedMixture:
    """`linear_soft_embedding`, with what `linear_soft_embedding_backward` takes."""
    return soft_embedding_recorded(linear_logits(h, head), table, tau)


def linear_soft_embedding_backward(
    h: Tensor,
    head: Head,
    vector: Tensor,
    table: Tensor,
    offset: Tensor,
    top: Tensor,
    max_prob: Tensor,
    token: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """`linear_relaxed_backward` of one table after `linear_soft_embedding_recorded`."""
    z = linear_logits(h, head)
    dz = soft_embedding_backward(z, vector, table, offset, top, max_prob, token, tau)
    return _head_backward(dz, z, head)


def relaxed_backward(z: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """The gradient that reaches logits z (N, V) through the relaxation p = softmax(z / tau).

        dL/dz = p * (D - <p, D>) / tau      with D = G - G(argmax p), G(v) = sum_k <vectors_k, tables_k[v]>

    A constant makes no difference to p * (G - <p, G>), but where one token is nearly certain, G - <p, G> is what is
    left of two numbers that are nearly equal. Relative to that token's G every digit of its gradient counts.
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (*vectors, *tables)), upcast(z).dtype)
    gradient = torch.zeros(z.shape, dtype=dtype, device=z.device)
    for vector, table in zip(vectors, tables, strict=True):
        gradient += vector.to(dtype) @ table.T.to(dtype)
    return _softmax_backward(z.to(dtype), gradient, tau).to(z.dtype)


def soft_embedding_recorded(z: Tensor, table: Tensor, tau: float = 1.0) -> RecordedMixture:
    """`soft_embedding`, with what `soft_embedding_backward` takes."""
    z = z.to(torch.promote_types(upcast(z).dtype, table.dtype))
    x, top = _relative(z, tau)
    p, token = torch.softmax(x, dim=-1), hard_token(z)
    known, table = token.clamp(min=0), table.to(p.dtype)
    others = p.scatter(-1, known.unsqueeze(-1), 0.0)
    offset = others @ table - others.sum(-1, keepdim=True) * table[known]
    return RecordedMixture(p @ table, offset, top, p.amax(-1), token)


def soft_embedding_backward(
    z: Tensor,
    vector: Tensor,
    table: Tensor,
    offset: Tensor,
    top: Tensor,
    max_prob: Tensor,
    token: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """`relaxed_backward` of one table after `soft_embedding_recorded`: <p, D> is <vector, offset>."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (vector, table, offset)), upcast(z).dtype)
    vector = vector.to(dtype)
    p = ((z.to(dtype) - top.unsqueeze(-1)) / tau).exp() * max_prob.unsqueeze(-1)
    gradient, known = vector @ table.T.to(dtype), token.clamp(min=0).unsqueeze(-1)
    difference = gradient - gradient.gather(-1, known).nan_to_num(0.0, 0.0, 0.0)
    mean = (vector * offset.to(dtype)).sum(-1, keepdim=True)
    return torch.where(p == 0, 0.0, p * (difference - mean) / tau).to(z.dtype)


def linear_relaxed_backward(
    h: Tensor, head: Head, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`relaxed_backward` carried on to hidden states: dL/dh (N, d), by one pass over the vocabulary (identity (b))."""
    z = linear_logits(h, head)
    return _head_backward(relaxed_backward(z, vectors, tables, tau), z, head)


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> LogLikelihood:
    """log softmax(logits(h))[token] per row, and with ``need_grad`` its gradient (N, d)."""
    logits = linear_logits(h, head)
    log_p = torch.log_softmax(_relative(logits, 1.0)[0], dim=-1)
    entry = tokens.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    known = entry.squeeze(-1) == tokens
    log_pi = torch.where(known, log_p.gather(-1, entry).squeeze(-1), torch.nan)
    if not need_grad:
        return LogLikelihood(log_pi, log_pi.new_empty(0, h.shape[-1]))
    # [v = token] - p. For a nearly certain token 1 - p keeps no digits, and the sum of the others' p does.
    others = log_p.exp().scatter(-1, entry, 0.0)
    weight = (-others).scatter(-1, entry, others.sum(-1, keepdim=True))
    return LogLikelihood(log_pi, _head_backward(torch.where(known.unsqueeze(-1), weight, torch.nan), logits, head))


def token_gradient(
    factors: TokenGradient,
    tables: Tables,
    least: torch.dtype = torch.float32,
    product: Callable[[Tensor, Tensor, torch.dtype], Tensor] = times_table,
) -> Tensor:
    """The gradient over the vocabulary (N, V), up to a constant per row, which DTO does not see.

    float32, or float64 where a factor, a table or ``least`` is. ``product`` multiplies vectors with tables.
    """
    operands = (*factors, tables.head.weight, tables.embedding, tables.reward_embedding)
    dtype = functools.reduce(
        torch.promote_types, (x.dtype for x in operands), torch.promote_types(least, torch.float32)
    )
    logits = scaled_and_capped(product(factors.hidden, tables.head.weight, dtype), tables.head)
    gradient = -tables.nll_coeff * logits
    for vector, table in zip(factors[1:], (tables.embedding, tables.reward_embedding), strict=True):
        gradient += product(vector, table, dtype)
    return gradient


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """L2 norm of the token gradient per row (N,), the log-sum-exp of the likelihood included (Alg. 3)."""
    norms = []
    for rows in row_chunks(factors.hidden.shape[0], tables.head.weight.shape[0]):
        part = factors.rows(rows)
        gradient = token_gradient(part, tables)
        if tables.nll_coeff:
            lse = torch.logsumexp(linear_logits(part.hidden, tables.head, gradient.dtype), dim=-1, keepdim=True)
            gradient = gradient + tables.nll_coeff * lse
        norms.append(gradient.norm(dim=-1))
    return torch.cat(norms)


def dto_step(state: DTOState, inputs: DTOInputs, tables: Tables, options: DTOOptions) -> DTOStep:
    """DTO steps (Alg. 2) of N rows for as long as the gradient holds.

    Up to ``max_steps`` times, for every row that still moves: take its hard token at the parameters as they are; if it
    is not ``tokens`` any more, the gradient is stale and the row stops there; else make one step,

        p = softmax((z + soft_noise) / tau)      dL/dz = p * (D - <p, D>) / tau      dL/dh = d(logits)/dh^T dL/dz

    with D = G - G(hard token), and Adam (betas 0.9 and 0.999, eps 1e-8). After the last step the token is taken once
    more. Rows of one group stop together, before the step that one of them cannot make.

    A row whose logits have no meaning with either noise has token -1 and makes no step. So does one whose ``step`` is
    negative. One whose ``tokens`` holds no id of the vocabulary makes no step, for its token differs.
    """
    parameters, exp_avg, exp_avg_sq, step, tokens = state
    learning_rates, gradient, soft_noise, hard_noise, group = inputs
    latents, tau, weight_decay, max_steps = options
    rows, vocabulary = parameters.shape[0], tables.head.weight.shape[0]
    group = torch.arange(rows, device=parameters.device) if group is None else group
    current = torch.cat(
        [
            hard_tokens(parameters[r], tables.head, latents, _rows(hard_noise, r), _rows(soft_noise, r))
            for r in row_chunks(rows, vocabulary)
        ]
    )
    current = torch.where(step < 0, -1, current)
    for _ in range(max_steps):
        # A row moves if no token of its group has changed and it has steps left.
        held = (current != tokens) | (current < 0) | (step >= len(learning_rates))
        held_groups = torch.unique(group[held])
        moving = (~torch.isin(group, held_groups)).nonzero().squeeze(-1)
        if len(moving) == 0:
            break
        for chunk in row_chunks(len(moving), vocabulary):
            index = moving[chunk]
            row = parameters[index]
            if isinstance(gradient, TokenGradient):
                dense = token_gradient(gradient.rows(index), tables, row.dtype)
            else:
                dense = gradient[index]
            z = linear_logits(row, tables.head) if latents else row
            dtype = torch.promote_types(z.dtype, dense.dtype)
            x = z if soft_noise is None else z + soft_noise[index]
            dz = _softmax_backward(x.to(dtype), dense.to(dtype), tau)
            grad = (_head_backward(dz, z, tables.head) if latents else dz).to(row.dtype)
            m, v = exp_avg[index], exp_avg_sq[index]
            step[index] += 1
            _adam(row, m, v, grad, step[index], learning_rates, weight_decay)
            parameters[index], exp_avg[index], exp_avg_sq[index] = row, m, v
            noises = _rows(hard_noise, index), _rows(soft_noise, index)
            current[index] = hard_tokens(row, tables.head, latents, *noises)
    return DTOStep(current, (current != tokens) | (current < 0))


def hard_tokens(
    parameters: Tensor, head: Head, latents: bool, hard_noise: Tensor | None = None, soft_noise: Tensor | None = None
) -> Tensor:
    """argmax of the rows' logits plus ``hard_noise``: (N,) int64; -1 for a row without meaning.

    That is one whose logits have none with either noise: with ``soft_noise`` it has no softmax to step by.
    """
    z = linear_logits(parameters, head) if latents else parameters
    token = hard_token(z if hard_noise is None else z + hard_noise)
    return token if soft_noise is None else torch.where((z + soft_noise).amax(-1).isfinite(), token, -1)


def _rows(x: Tensor | None, index: slice | Tensor) -> Tensor | None:
    return None if x is None else x[index]


def token_diff(old: Tensor, new: Tensor) -> TokenDiff:
    """First changed position and number of changed positions per row of token ids (B, m)."""
    changed = old != new
    count = changed.sum(-1)
    if old.shape[-1] == 0:
        return TokenDiff(torch.zeros_like(count), count)
    first = torch.where(count > 0, changed.int().argmax(-1), old.shape[-1])
    return TokenDiff(first, count)


def draw_token(
    z: Tensor, low: Tensor, high: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token (N,) int64 per row of logits z (N, V), by Gumbel-max over what temperature, top-k and top-p keep.

    Of equal scores the lowest token; -1 for a row without meaning. Temperature 0 takes `hard_token`.
    """
    z = upcast(z)
    if temperature == 0:
        return hard_token(z)
    kept = warp(z, temperature, top_k, top_p)
    score, token = with_noise(kept, kept, low & MASK, high & MASK, 1.0).max(-1)
    return torch.where(score.isfinite(), token, -1)


def row_chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of rows whose (rows, V) temporaries stay within a fixed budget; one empty slice for no rows."""
    size = max(1, _CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _softmax_backward(x: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """p * (D - <p, D>) / tau with p = softmax(x / tau) and D = G - G(argmax p)."""
    p = torch.softmax(_relative(x, tau)[0], dim=-1)
    origin = gradient.gather(-1, x.argmax(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    # 0 * inf would be NaN where a -inf logit meets an infinite gradient; such entries cannot move.
    weighted = torch.where(p > 0, p * (gradient - origin), 0.0)
    return (weighted - p * weighted.sum(-1, keepdim=True)) / tau


def _head_backward(dz: Tensor, z: Tensor, head: Head) -> Tensor:
    if head.softcap:
        dz = dz * (1 - (z / head.softcap) ** 2)
    dtype = torch.promote_types(dz.dtype, head.weight.dtype)
    return head.scale * (dz.to(dtype) @ head.weight.to(dtype))


def _adam(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    learning_rates: Tensor,
    weight_decay: float,
) -> None:
    """Adam with a step count per row (1 for the first step), as `torch.optim.Adam` does it."""
    count = step.to(parameters.dtype).unsqueeze(-1)
    rate = learning_rates.to(parameters.dtype)[step - 1].unsqueeze(-1)
    if weight_decay:
        grad = grad + weight_decay * parameters
    exp_avg.lerp_(grad, 1 - 0.9)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
    denominator = (exp_avg_sq / (1 - 0.999**count)).sqrt_().add_(1e-8)
    parameters.sub_(rate / (1 - 0.9**count) * exp_avg / denominator)
