"""Proposals: which token each sequence tries next at the position that was selected (steps 3 and 4 of the decode).

A token that is the present one is committed. Another one is rolled out, and replaces the present one if the reward of
its response is higher. `NablaConfig.proposal` names one of `PROPOSALS`; "guided" chooses while a response is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast import dto, ops
from nabla_fast.comparison import highest
from nabla_fast.config import Sampling
from nabla_fast.objective import Objective, Request
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

_GREEDY = Sampling(temperature=0.0)


class Proposer(NamedTuple):
    """What proposals are made with.

    Attributes:
        objective: the models, their gradients and rewards.
        sampler: draws tokens, and applies the caller's logits processors.
        phase: a block in which the time is that of a phase, by its name and the sequences.
    """

    objective: Objective
    sampler: Sampler
    phase: Callable[[str, Seq[Sequence]], AbstractContextManager[None]]


Proposal = Callable[[Seq[Sequence], Proposer], list[int]]


def optimized(sequences: Seq[Sequence], by: Proposer) -> list[int]:
    """DTO from the latents ahead, and a token drawn from the optimized logits. Source: Alg. 2 to 4."""
    config = by.objective.config
    with by.phase("dto", sequences):
        results = dto.optimize_batch(sequences, [_start(s, by.objective) for s in sequences], by.objective)
    logits = torch.cat([result.logits[:1] for result in results])
    with by.phase("resample", sequences):
        committed = [sequence.committed for sequence in sequences]
        return by.sampler(logits, config.resample, sequences, committed).tolist()


def first_order(sequences: Seq[Sequence], by: Proposer) -> list[int]:
    """Of the likeliest tokens and the present one, that with the least objective (Eq. 2) to first order: one gradient
    at the response as it was drawn, no step."""
    candidates = _candidates(sequences, by)
    requests = [Request(s, s.current.tokens, s.position) for s in sequences]
    evaluations = by.objective.evaluate(requests)
    with by.phase("resample", sequences):
        rows = [e.rows_from(s.position).rows(slice(0, 1)) for e, s in zip(evaluations, sequences, strict=True)]
        factors = ops.TokenGradient(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        gradient = ops.token_gradient(factors, by.objective.tables)
        # A sequence with fewer candidates has its first one again.
        most = max(map(len, candidates))
        filled = torch.tensor([[*own, *own[:1] * (most - len(own))] for own in candidates], device=gradient.device)
        best = gradient.gather(1, filled).argmin(1, keepdim=True)
        return filled.gather(1, best)[:, 0].tolist()


def prefix_reward(sequences: Seq[Sequence], by: Proposer) -> list[int]:
    """Of the likeliest tokens and the present one, that after which the reward of the response so far is highest."""
    candidates = _candidates(sequences, by)
    prefixes = [s.current.tokens[: s.position] for s in sequences]
    return _best(candidates, by.objective.prefix_rewards(sequences, prefixes, candidates))


def likeliest(sequences: Seq[Sequence], by: Proposer) -> list[int]:
    """The likeliest other token: the control, which asks neither a gradient nor a reward."""
    with by.phase("resample", sequences):
        scores = _scores(sequences, by)
        present = torch.tensor([_present(s) for s in sequences], device=scores.device)
        best = scores.scatter(1, present.unsqueeze(1), -torch.inf).max(1)
        # Where the logits processors allow one token alone, there is no other.
        return torch.where(best.values == -torch.inf, present, best.indices).tolist()


PROPOSALS: dict[str, Proposal] = {
    "dto": optimized,
    "first_order": first_order,
    "prefix_reward": prefix_reward,
    "likeliest": likeliest,
}
"""Of `nabla_fast.config.PROPOSALS` those that propose for a response that is there."""


@dataclass(frozen=True)
class GuidedSampler(Sampler):
    """Draws as ``inner`` does; where the model is uncertain, it takes the candidate of the highest prefix reward.

    So a response is decided on while it is drawn, and no token is drawn twice.
    """

    inner: Sampler
    objective: Objective

    def __call__(
        self, logits: Tensor, sampling: Sampling, sequences: Seq[Sequence], responses: Seq[tuple[int, ...]]
    ) -> Tensor:
        config = self.objective.config
        drawn = self.inner(logits, sampling, sequences, responses)
        stats = ops.relaxed_stats(logits, 1.0, config.entropy_threshold, config.confidence_threshold, config.backend)
        forks = stats.mask.nonzero().flatten().tolist()
        if not forks:
            return drawn
        where, so_far = [sequences[i] for i in forks], [responses[i] for i in forks]
        scores, _ = self.inner.processed(logits[forks], _GREEDY, where, so_far)
        candidates = _top(scores, config.candidates)
        prefixes = [torch.tensor(response, dtype=torch.int64) for response in so_far]
        chosen = _best(candidates, self.objective.prefix_rewards(where, prefixes, candidates))
        return drawn.index_copy(0, torch.tensor(forks, device=drawn.device), drawn.new_tensor(chosen))


def sampler_of(sampler: Sampler, objective: Objective) -> Sampler:
    """What draws rollouts: ``sampler``, which a "guided" decode asks prefix rewards besides."""
    return GuidedSampler(sampler, objective) if objective.config.proposal == "guided" else sampler


def _best(candidates: Seq[Seq[int]], rewards: Seq[Seq[float]]) -> list[int]:
    """The candidate of the highest reward of each sequence, of equals the first."""
    return [own[highest(values)] for own, values in zip(candidates, rewards, strict=True)]


def _candidates(sequences: Seq[Sequence], by: Proposer) -> list[list[int]]:
    """The present token of each sequence and its ``candidates`` likeliest, without repeats."""
    with by.phase("resample", sequences):
        likely = _top(_scores(sequences, by), by.objective.config.candidates)
        return [list(dict.fromkeys([_present(s), *row])) for s, row in zip(sequences, likely, strict=True)]


def _scores(sequences: Seq[Sequence], by: Proposer) -> Tensor:
    """Logits (B, V) of each sequence's next token, behind the caller's logits processors."""
    latents = torch.cat([s.current.latents[s.position : s.position + 1] for s in sequences])
    logits = by.objective.language_model.logits(latents)
    return by.sampler.processed(logits, _GREEDY, sequences, [s.committed for s in sequences])[0]


def _top(scores: Tensor, count: int) -> list[list[int]]:
    """The ``count`` likeliest tokens of each row that are allowed, the likeliest first."""
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    allowed = (best.values > -torch.inf).tolist()
    return [
        [t for t, ok in zip(row, own, strict=True) if ok]
        for row, own in zip(best.indices.tolist(), allowed, strict=True)
    ]


def _present(sequence: Sequence) -> int:
    return int(sequence.current.tokens[sequence.position])


def _start(sequence: Sequence, objective: Objective) -> Tensor:
    """The parameters that DTO starts from: latents or logits of the rows that move."""
    t, config = sequence.position, objective.config
    rows = sequence.current.latents[t:] if config.update_postfix else sequence.current.latents[t : t + 1]
    return rows if config.parameterization == "latents" else objective.language_model.logits(rows)
