"""Where the one-row pass takes the gradient over the vocabulary from.

Factors are brought into the form

    G(v) = <a, W_v> + <x1, T1_v> + <x2, T2_v>      (or alpha * logits(a)(v) in place of the first term, under a softcap)

so that a table that is the head itself (tied embeddings) is read once: its vector is folded into ``a``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.ops.triton._launch import same_table
from nabla_fast.ops.types import Head, Tables, TokenGradient


@dataclass(frozen=True)
class Gradient:
    """G over the vocabulary, dense (N, V) or in the form above."""

    dense: Tensor | None = None
    a: Tensor | None = None
    capped: bool = False
    alpha: float = 0.0
    terms: tuple[tuple[Tensor, Tensor], ...] = ()


def from_factors(gradient: Tensor | TokenGradient, tables: Tables) -> Gradient:
    """G of `TokenGradient` factors, or a dense one."""
    if isinstance(gradient, Tensor):
        return Gradient(dense=gradient)
    head, nll = tables.head, tables.nll_coeff
    embedding, reward = gradient.embedding.contiguous(), gradient.reward_embedding.contiguous()
    terms = ((embedding, tables.embedding), (reward, tables.reward_embedding))
    if head.softcap:
        return Gradient(a=gradient.hidden.contiguous(), capped=True, alpha=-nll, terms=terms)
    a = gradient.hidden.float() * (-nll * head.scale)
    if same_table(tables.embedding, head.weight):
        return Gradient(a=(a + embedding.float()).contiguous(), terms=terms[1:])
    return Gradient(a=a.contiguous(), terms=terms)


def at_tokens(gradient: Gradient, head: Head, tokens: Tensor) -> Tensor:
    """G of each row's token: (N,) float32; 0 where it is not finite."""
    tokens = tokens.clamp(0, head.weight.shape[0] - 1)
    if gradient.dense is not None:
        value = gradient.dense.gather(1, tokens.unsqueeze(1)).squeeze(1).float()
    else:
        value = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        if gradient.a is not None:
            value = (gradient.a.float() * head.weight[tokens].float()).sum(-1)
        if gradient.capped:
            value = gradient.alpha * head.softcap * torch.tanh(head.scale * value / head.softcap)
        for vector, table in gradient.terms:
            value = value + (vector.float() * table[tokens].float()).sum(-1)
    return value.nan_to_num(0.0, 0.0, 0.0)
