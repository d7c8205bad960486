"""Selection of the next token to optimize (step 2 of the decode, Alg. 3)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence


def select(sequences: Seq[Sequence], objective: Objective, config: NablaConfig) -> list[int]:
    """The first position of each sequence, from its own on, that passes every criterion that is set; the length of its
    response where none does."""
    selected = [_next_uncertain(s, s.position) for s in sequences]
    least = config.least_gradient
    if least is None:
        return selected
    evaluated: dict[int, tuple[int, Evaluation]] = {}  # sequence → the position it was evaluated at last
    pending = [i for i, s in enumerate(sequences) if selected[i] < len(s.current.tokens)]
    while pending:
        stale = [i for i in pending if i not in evaluated or not _alike(sequences[i], evaluated[i][0], selected[i])]
        requests = [Request(sequences[i], _anchored(sequences[i], selected[i]), selected[i]) for i in stale]
        for i, evaluation in zip(stale, objective.evaluate(requests), strict=True):
            evaluated[i] = selected[i], evaluation
        norms = gradient_norms([evaluated[i][1] for i in pending], [selected[i] for i in pending], objective)
        failed = [i for i, norm in zip(pending, norms, strict=True) if norm < least]
        for i in failed:
            selected[i] = _next_uncertain(sequences[i], selected[i] + 1)
        pending = [i for i in failed if selected[i] < len(sequences[i].current.tokens)]
    return selected


def gradient_norms(evaluations: Seq[Evaluation], positions: Seq[int], objective: Objective) -> list[float]:
    """||G_t||_2 of one position of each evaluation."""
    rows = [evaluation.rows_from(t).rows(slice(0, 1)) for evaluation, t in zip(evaluations, positions, strict=True)]
    factors = ops.TokenGradient(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return ops.gradient_norm(factors, objective.tables, backend=objective.config.backend).tolist()


def _next_uncertain(sequence: Sequence, start: int) -> int:
    later = sequence.current.uncertain[start:].nonzero()
    return start + int(later[0]) if len(later) else len(sequence.current.tokens)


def _anchored(sequence: Sequence, position: int) -> Tensor:
    """The response that DTO at ``position`` starts from: committed tokens before it, hard tokens from there on."""
    return torch.cat([sequence.current.tokens[:position], sequence.current.hard[position:]])


def _alike(sequence: Sequence, earlier: int, later: int) -> bool:
    """Whether DTO starts from one and the same response at both positions."""
    return torch.equal(sequence.current.tokens[earlier:later], sequence.current.hard[earlier:later])
