"""Operators of the optimisation loop: DTO steps, token differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import checks
from nabla_fast.ops.backends import implementation, resolve
from nabla_fast.ops.library import HEAD, register, statistic_dtype
from nabla_fast.ops.operands import Head, Tables, TokenGradient

_MASTERS = (torch.float32, torch.float64)


def _step_kernel(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Sequence[Tensor],
    weight: Tensor,
    scale: float,
    softcap: float,
    embedding: Tensor,
    reward_embedding: Tensor,
    nll_coeff: float,
    latents: bool,
    tau: float,
    weight_decay: float,
    soft_noise: Tensor | None,
    hard_noise: Tensor | None,
    group: Tensor | None,
    max_steps: int,
    backend: str,
) -> Any:
    checks.ids("tokens", tokens, weight.shape[0])
    checks.numbers("step", step)
    checks.numbers("learning_rates", learning_rates)
    checks.ascending("group", group)
    token, changed = implementation("dto_step", backend)(
        parameters,
        exp_avg,
        exp_avg_sq,
        step,
        tokens,
        learning_rates,
        gradient[0] if len(gradient) == 1 else TokenGradient(*gradient),
        Tables(Head(weight, scale, softcap), embedding, reward_embedding, nll_coeff),
        latents=latents,
        tau=tau,
        weight_decay=weight_decay,
        soft_noise=soft_noise,
        hard_noise=hard_noise,
        group=group,
        max_steps=max_steps,
    )
    return token, changed


def _step_check(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Sequence[Tensor],
    weight: Tensor,
    scale: float,
    softcap: float,
    embedding: Tensor,
    reward_embedding: Tensor,
    nll_coeff: float,
    latents: bool,
    tau: float,
    weight_decay: float,
    soft_noise: Tensor | None,
    hard_noise: Tensor | None,
    group: Tensor | None,
    max_steps: int,
    backend: str,
) -> None:
    checks.floats(parameters, "parameters", _MASTERS)
    checks.floats(learning_rates, "learning_rates", _MASTERS)
    checks.shape(parameters, ("N", "d" if latents else "V"), "parameters")
    rows, width = parameters.shape
    # Rows of logits meet the head only through its number of entries.
    checks.head(parameters if latents else parameters[:, :0], weight if latents else weight[:, :0], scale, softcap)
    vocabulary = weight.shape[0]
    if not latents:
        checks.shape(parameters, (rows, vocabulary), "parameters")
    state = {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, x in state.items():
        checks.floats(x, name, (parameters.dtype,))
        checks.shape(x, (rows, width), name)
    for name, x in {**state, "step": step}.items():
        checks.separate(name, x)
    for name, ids in {"step": step, "tokens": tokens, "group": group}.items():
        checks.integers(ids, rows, name)
    checks.shape(learning_rates, ("S",), "learning_rates")
    checks.rows(soft_noise, rows, vocabulary, "soft_noise")
    checks.rows(hard_noise, rows, vocabulary, "hard_noise")
    where = {"gradient": gradient[0]}
    if len(gradient) == 1:
        checks.rows(gradient[0], rows, vocabulary, "gradient")
    else:
        where = dict(zip(("gradient.hidden", "gradient.embedding", "gradient.reward_embedding"), gradient, strict=True))
        where |= {"tables.embedding": embedding, "tables.reward_embedding": reward_embedding}
        checks.table(embedding, vocabulary, "tables.embedding")
        checks.table(reward_embedding, vocabulary, "tables.reward_embedding")
        checks.rows(gradient[0], rows, weight.shape[1], "gradient.hidden")
        checks.rows(gradient[1], rows, embedding.shape[1], "gradient.embedding")
        checks.rows(gradient[2], rows, reward_embedding.shape[1], "gradient.reward_embedding")
    checks.one_device(
        **state, step=step, tokens=tokens, learning_rates=learning_rates, soft_noise=soft_noise,
        hard_noise=hard_noise, group=group, **where, **{"head.weight": weight},
    )  # fmt: skip
    checks.temperature(tau)
    checks.number("nll_coeff", nll_coeff)
    checks.number("weight_decay", weight_decay, least=0.0)
    checks.number("max_steps", max_steps, least=0)


def _step_fake(parameters: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, tokens: Tensor, *_: Any) -> Any:
    return torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.bool)


_dto_step = register(
    "dto_step(Tensor(a!) parameters, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor tokens, "
    f"Tensor learning_rates, Tensor[] gradient, {HEAD}, Tensor embedding, Tensor reward_embedding, float nll_coeff, "
    "bool latents, float tau, float weight_decay, Tensor? soft_noise, Tensor? hard_noise, Tensor? group, "
    "SymInt max_steps, str backend) -> (Tensor token, Tensor changed)",
    _step_kernel,
    _step_fake,
    check=_step_check,
)


def _diff_kernel(old: Tensor, new: Tensor, backend: str) -> Any:
    first, count = implementation("token_diff", backend)(old, new)
    return first, count


def _diff_check(old: Tensor, new: Tensor, backend: str) -> None:
    for name, tokens in (("old", old), ("new", new)):
        checks.dense(tokens, name)
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} must be a tensor of dtype int64, got {tokens.dtype}")
    checks.shape(old, ("B", "m"), "old")
    checks.shape(new, tuple(old.shape), "new")
    checks.one_device(old=old, new=new)


_token_diff = register(
    "token_diff(Tensor old, Tensor new, str backend) -> (Tensor first, Tensor count)",
    _diff_kernel,
    lambda old, new, backend: (old.new_empty(old.shape[0]), old.new_empty(old.shape[0])),
    check=_diff_check,
)


def dto_step(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Tensor | TokenGradient,
    tables: Tables,
    *,
    latents: bool,
    tau: float = 1.0,
    weight_decay: float = 0.0,
    soft_noise: Tensor | None = None,
    hard_noise: Tensor | None = None,
    group: Tensor | None = None,
    max_steps: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Steps of DTO for as long as the gradient holds; see `reference.dto_step` for arguments and meaning.

    Updates ``parameters``, ``exp_avg``, ``exp_avg_sq`` and ``step`` in place. Where another operand is float64, the
    gradient is computed in float64, and rounded to the parameters' dtype.

    Returns:
        (N,) int64, each row's hard token now, -1 where it has none; (N,) bool, whether it differs from ``tokens`` or is
        -1.

    Raises:
        IndexError: for a token that is not in the vocabulary, on the CPU.
        ValueError: for a negative step or a learning rate that is negative or not finite, on the CPU. On a GPU a row
            with such a token or step makes no step, and counts as changed.

    Source: Alg. 2 of ∇-Reasoner.
    """
    head, embedding, reward_embedding, nll_coeff = tables
    factors = list(gradient) if isinstance(gradient, TokenGradient) else [gradient]
    used = (*factors, embedding, reward_embedding) if isinstance(gradient, TokenGradient) else factors
    dtype = statistic_dtype(parameters, *used, head.weight if latents else None)
    token, changed = _dto_step(
        parameters,
        exp_avg,
        exp_avg_sq,
        step,
        tokens,
        learning_rates,
        factors,
        *head,
        embedding,
        reward_embedding,
        nll_coeff,
        latents,
        tau,
        weight_decay,
        soft_noise,
        hard_noise,
        group,
        max_steps,
        resolve("dto_step", backend, parameters.device, dtype),
    )
    return token, changed


def token_diff(old: Tensor, new: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """First changed position (m where nothing changed) and number of changes per row of token ids (B, m) int64."""
    first, count = _token_diff(old, new, resolve("token_diff", backend, old.device))
    return first, count
