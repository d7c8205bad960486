"""Evaluated gradients, keyed by the token ids they belong to, least recently used out first."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from nabla_fast.ops import TokenGradient


@dataclass(frozen=True)
class Evaluation:
    """The objective and its token gradient at one response.

    Attributes:
        start: first response position that the factors cover.
        factors: token gradient of positions start, start + 1, ... (m rows).
        log_likelihoods: log pi at each of those positions.
        reward: of the whole response.
    """

    start: int
    factors: TokenGradient
    log_likelihoods: tuple[float, ...]
    reward: float

    def rows_from(self, position: int) -> TokenGradient:
        """The factors of response positions ``position`` and later; a view."""
        return self.factors.rows(slice(position - self.start, None))

    @property
    def log_likelihood(self) -> float:
        """Sum of log pi over all of those positions."""
        return self.log_likelihood_from(self.start)

    def log_likelihood_from(self, position: int) -> float:
        """Sum of log pi over response positions ``position`` and later."""
        return math.fsum(self.log_likelihoods[position - self.start :])

    @property
    def nbytes(self) -> int:
        return sum(_storage_bytes(factor) for factor in self.factors)


class GradientCache:
    """Maps token ids to evaluations under a byte budget.

    Args:
        max_bytes: budget; an entry larger than it is not kept.

    Attributes:
        bytes: held now.
        evictions: entries dropped to stay within the budget.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.evictions = 0
        self._entries: OrderedDict[tuple[int, ...], Evaluation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: tuple[int, ...], start: int) -> Evaluation | None:
        """The evaluation of exactly these tokens, if it covers response positions from ``start`` on."""
        entry = self._entries.get(tokens)
        if entry is None or entry.start > start:
            return None
        self._entries.move_to_end(tokens)
        return entry

    def insert(self, tokens: tuple[int, ...], evaluation: Evaluation) -> None:
        """Keeps an evaluation, in place of an older one of the same tokens."""
        old = self._entries.pop(tokens, None)
        if old is not None:
            self.bytes -= old.nbytes
        if evaluation.nbytes > self.max_bytes:
            return
        self._entries[tokens] = evaluation
        self.bytes += evaluation.nbytes
        while self.bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.bytes -= evicted.nbytes
            self.evictions += 1


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
