"""Which token to optimise next (step 2 of the decode, Alg. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation
from nabla_fast.objective import Conversation, Objective, Request


@dataclass
class Candidates:
    """One sequence's positions ahead.

    Attributes:
        conversation: prompt and counters.
        tokens: (n,) int64 the whole response as it stands, on the CPU.
        hard: (n,) int64 the tokens that DTO starts from at each position, on the CPU.
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

    def alike(self, earlier: int, later: int) -> bool:
        """Whether DTO starts from one and the same response at both positions."""
        return torch.equal(self.tokens[earlier:later], self.hard[earlier:later])


def select(candidates: Sequence[Candidates], objective: Objective, config: NablaConfig) -> list[int]:
    """The first position of each sequence that passes every criterion that is set; its length where none does."""
    selected = [_next_masked(c, c.position) for c in candidates]
    if config.gradient_threshold is None:
        return selected
    evaluated: dict[int, tuple[int, Evaluation]] = {}  # candidate → the position it was evaluated at last
    pending = [i for i, c in enumerate(candidates) if selected[i] < len(c.tokens)]
    while pending:
        stale = [i for i in pending if i not in evaluated or not candidates[i].alike(evaluated[i][0], selected[i])]
        requests = [Request(c.conversation, c.anchored(t), t) for c, t in ((candidates[i], selected[i]) for i in stale)]
        for i, evaluation in zip(stale, objective.evaluate(requests), strict=True):
            evaluated[i] = selected[i], evaluation
        norms = gradient_norms([evaluated[i][1] for i in pending], [selected[i] for i in pending], objective)
        failed = [i for i, norm in zip(pending, norms, strict=True) if norm < config.gradient_threshold]
        for i in failed:
            selected[i] = _next_masked(candidates[i], selected[i] + 1)
        pending = [i for i in failed if selected[i] < len(candidates[i].tokens)]
    return selected


def gradient_norms(evaluations: Sequence[Evaluation], positions: Sequence[int], objective: Objective) -> list[float]:
    """||G_t||_2 of one position of each evaluation."""
    rows = [evaluation.rows_from(t).rows(slice(0, 1)) for evaluation, t in zip(evaluations, positions, strict=True)]
    factors = ops.TokenGradient(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return ops.gradient_norm(factors, objective.tables, backend=objective.config.backend).tolist()


def _next_masked(candidates: Candidates, start: int) -> int:
    later = candidates.mask[start:].nonzero()
    return start + int(later[0]) if len(later) else len(candidates.tokens)
