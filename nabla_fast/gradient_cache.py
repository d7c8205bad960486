"""Evaluated gradients, keyed by the token ids they belong to, least recently used out first.

A gradient depends on the hard tokens alone. Cached, it serves every later position of a response, its gradient norms
and the first step of DTO, for as long as no token changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast.gradient_cache_python import PythonGradientCache
from nabla_fast.ops import TokenGradient, native


@dataclass(frozen=True)
class Evaluation:
    """The objective and its token gradient at one response.

    Attributes:
        start: first response position that the factors cover.
        factors: token gradient of positions start, start + 1, ... (m rows).
        log_likelihoods: (m,) float64 on the CPU, log pi at each of those positions.
        reward: of the whole response.
    """

    start: int
    factors: TokenGradient
    log_likelihoods: Tensor
    reward: float

    def rows_from(self, position: int) -> TokenGradient:
        """The factors of response positions ``position`` and later; views.

        Raises:
            ValueError: if ``position`` is below ``start`` or above ``start + m``.
        """
        return self.factors.rows(slice(self._row(position), None))

    @property
    def log_likelihood(self) -> float:
        """Sum of log pi over all of those positions, in nats."""
        return self.log_likelihood_from(self.start)

    def log_likelihood_from(self, position: int) -> float:
        """Sum of log pi over response positions ``position`` and later, correctly rounded.

        Raises:
            ValueError: as `rows_from`.
        """
        return math.fsum(self.log_likelihoods[self._row(position) :].tolist())

    def _row(self, position: int) -> int:
        end = self.start + len(self.log_likelihoods)
        if not self.start <= position <= end:
            raise ValueError(
                f"position must be from {self.start} to {end}, which this evaluation covers; got {position}"
            )
        return position - self.start


class Found(NamedTuple):
    """What `GradientCache.find` found.

    Attributes:
        evaluation: of exactly the tokens asked for; None on a miss.
        common_prefix: leading tokens in common with the nearest entry: all n on a hit, 0 if there is no entry. All n on
            a miss too, where the nearest entry has more tokens, or these but starts too late.
        changed: int64 on the tokens' device, positions where the nearest entry has another token, up to the end of
            the shorter one.
    """

    evaluation: Evaluation | None
    common_prefix: int
    changed: Tensor


class GradientCache:
    """Maps token ids to evaluations and rewards under a byte budget. Safe to share between threads.

    ``tokens`` is (n,) int64 on any device, everything that the gradient depends on: prompt and response. Tokens not on
    the CPU are not copied there, unless the native library is missing. Entries of another device than the tokens'
    are never found.

    The tokens are copied, an evaluation's tensors are kept and returned as they are: nobody may write to them, and a
    view would keep alive what it is a view of. An entry counts the bytes of its tokens and of these tensors.

    Every method raises TypeError where tokens are not an int64 tensor, ValueError where they are not 1-D.

    Args:
        max_bytes: budget; the least recently used entries go first. An entry larger than it is not kept, and leaves
            everything as it was.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache: Any = (
            torch.classes.nabla_fast.GradientCache(max_bytes) if native.available() else PythonGradientCache(max_bytes)
        )

    def find(self, tokens: Tensor, start: int) -> Found:
        """The evaluation of exactly these tokens that covers response positions from ``start`` on, or what is near.

        A hit is a use. On a miss, the nearest entry is that with the longest common prefix (of several, the one used
        last), counted as a partial hit if there is one; state computed for it can be reused up to the first change.

        Raises:
            ValueError: if ``start`` is negative.
        """
        entry_start, values, reward, common_prefix, changed = self._cache.find(_tensor(tokens), start)
        if not values:
            return Found(None, common_prefix, changed)
        *factors, log_likelihoods = values
        evaluation = Evaluation(entry_start, TokenGradient(*factors), log_likelihoods, reward)
        return Found(evaluation, common_prefix, changed)

    def find_reward(self, tokens: Tensor) -> float | None:
        """The reward of exactly these tokens, or None; a use of its entry."""
        reward: float | None = self._cache.find_reward(_tensor(tokens))
        return reward

    def insert(self, tokens: Tensor, evaluation: Evaluation) -> None:
        """Keeps an evaluation in place of an older one of the same tokens, unless that one starts earlier.

        An older one that stays counts as used.

        Raises:
            TypeError: if the log-likelihoods are not float64.
            ValueError: if the start is negative, or the shapes do not fit together or to the number of tokens.
        """
        values = [*evaluation.factors, evaluation.log_likelihoods]
        self._cache.insert(_tensor(tokens), evaluation.start, values, float(evaluation.reward))

    def insert_reward(self, tokens: Tensor, reward: float) -> None:
        """Keeps a reward: of an entry that is there, next to its evaluation, else on its own; a use of the entry."""
        self._cache.insert_reward(_tensor(tokens), float(reward))

    def clear(self) -> None:
        """Drops every entry; the counters stay."""
        self._cache.clear()

    def stats(self) -> dict[str, int]:
        """Counters since the start: ``hits``, ``misses``, ``partial_hits`` (misses with a common prefix),
        ``reward_hits``, ``reward_misses``, ``evictions`` (entries that made room for others); and ``entries`` and
        ``bytes`` held now.
        """
        return dict(self._cache.stats())

    def __len__(self) -> int:
        return self.stats()["entries"]

    @property
    def bytes(self) -> int:
        """Held now, never above ``max_bytes``."""
        return self.stats()["bytes"]


def _tensor(tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"GradientCache: tokens must be an int64 tensor of shape (n,), got {type(tokens).__name__}")
    return tokens
