"""Operators of the optimisation loop: DTO steps, token differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.backends import implementation, resolve
from nabla_fast.ops.library import HEAD, register
from nabla_fast.ops.operands import Head, Tables, TokenGradient


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


def _step_fake(parameters: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, tokens: Tensor, *_: Any) -> Any:
    return torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.bool)


_dto_step = register(
    "dto_step(Tensor(a!) parameters, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor tokens, "
    f"Tensor learning_rates, Tensor[] gradient, {HEAD}, Tensor embedding, Tensor reward_embedding, float nll_coeff, "
    "bool latents, float tau, float weight_decay, Tensor? soft_noise, Tensor? hard_noise, Tensor? group, "
    "SymInt max_steps, str backend) -> (Tensor token, Tensor changed)",
    _step_kernel,
    _step_fake,
)


def _diff_kernel(old: Tensor, new: Tensor, backend: str) -> Any:
    first, count = implementation("token_diff", backend)(old, new)
    return first, count


_token_diff = register(
    "token_diff(Tensor old, Tensor new, str backend) -> (Tensor first, Tensor count)",
    _diff_kernel,
    lambda old, new, backend: (old.new_empty(old.shape[0]), old.new_empty(old.shape[0])),
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

    Updates ``parameters``, ``exp_avg``, ``exp_avg_sq`` and ``step`` in place.

    Returns:
        (N,) int64, each row's hard token now; (N,) bool, whether it differs from ``tokens``.

    Source: Alg. 2 of ∇-Reasoner.
    """
    head, embedding, reward_embedding, nll_coeff = tables
    token, changed = _dto_step(
        parameters,
        exp_avg,
        exp_avg_sq,
        step,
        tokens,
        learning_rates,
        list(gradient) if isinstance(gradient, TokenGradient) else [gradient],
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
        resolve("dto_step", backend, parameters.device.type, parameters.dtype),
    )
    return token, changed


def token_diff(old: Tensor, new: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """First changed position (m where nothing changed) and number of changes per row of token ids (B, m) int64."""
    first, count = _token_diff(old, new, resolve("token_diff", backend, old.device.type, old.dtype))
    return first, count
