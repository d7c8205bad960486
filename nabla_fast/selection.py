"""Which token to optimise next (step 2 of the decode, Alg. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.objective import Conversation, Objective, Request


@dataclass
class Candidates:
    """One sequence's positions ahead.

    Attributes:
        conversation: prompt and counters.
        tokens: (n,) the whole response as it stands.
        hard: (n,) the tokens that DTO starts from at each position.
        mask: (n,) bool, True where entropy and confidence pass.
        position: the first position ahead.
    """

    conversation: Conversation
    tokens: Tensor
    hard: Tensor
    mask: Tensor
    position: int

    def anchored(self, position: int) -> Tensor:
        """The response that DTO at ``position`` starts from: committed tokens before it, hard tokens from there on."""
        return torch.cat([self.tokens[:position], self.hard[position:]])


def select(candidates: Sequence[Candidates], objective: Objective, config: NablaConfig) -> list[int]:
    """The first position of each sequence that passes every criterion that is set; its length where none does."""
    selected = [_next_masked(c, c.position) for c in candidates]
    if config.gradient_threshold is None:
        return selected
    pending = [i for i, c in enumerate(candidates) if selected[i] < len(c.tokens)]
    while pending:
        norms = gradient_norms([candidates[i] for i in pending], [selected[i] for i in pending], objective)
        failed = [i for i, norm in zip(pending, norms, strict=True) if norm < config.gradient_threshold]
        for i in failed:
            selected[i] = _next_masked(candidates[i], selected[i] + 1)
        pending = [i for i in failed if selected[i] < len(candidates[i].tokens)]
    return selected


def gradient_norms(candidates: Sequence[Candidates], positions: Sequence[int], objective: Objective) -> list[float]:
    """||G_t||_2 of one position per sequence, at the tokens that DTO would start from there."""
    requests = [Request(c.conversation, c.anchored(t), t) for c, t in zip(candidates, positions, strict=True)]
    evaluations = objective.evaluate(requests)
    rows = [evaluation.rows_from(t).rows(slice(0, 1)) for evaluation, t in zip(evaluations, positions, strict=True)]
    factors = ops.TokenGradient(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return ops.gradient_norm(factors, objective.tables, backend=objective.config.backend).tolist()


def _next_masked(candidates: Candidates, start: int) -> int:
    later = candidates.mask[start:].nonzero()
    return start + int(later[0]) if len(later) else len(candidates.tokens)
