"""A response in the tokens that a reward model reads, and its gradient in those of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Which of m tokens are read at each of n positions of a response.

    Attributes:
        index: (n, k) int64, rows in ascending order.
        share: (n, k) how much of each token belongs to the position, in [0, 1]; 0 where there are fewer than k.
        slots: of a gradient at a position: one for each of its first tokens, and the last one for all others.
    """

    index: Tensor
    share: Tensor
    slots: int


@dataclass(frozen=True)
class Reading:
    """A response of n tokens of the language model as a reward model reads it.

    Attributes:
        size: n.
        tokens: (m,) int64, on the CPU, ids of the reward model's ``reading_table``.
        spans: where they are read; None if token i is read at position i. At positions past those nothing is.
        ended: whether its last token is an end token that is not among ``tokens``.
    """

    size: int
    tokens: Tensor
    spans: Spans | None = None
    ended: bool = False

    def first(self, position: int) -> int:
        """The first token that is read at response position ``position`` or later; with spans the last one, if no other
        is."""
        if self.spans is None:
            return position
        read = self.spans.index[position:][self.spans.share[position:] > 0]
        return min([*read.tolist(), max(len(self.tokens) - 1, 0)])

    def rows(self, gradient: Tensor, position: int, first: int) -> Tensor:
        """The gradient (n - position, slots * d) at response positions ``position`` and later: those at its tokens, by
        their shares.

        Args:
            gradient: (m - first, d) at the tokens from ``first`` on.
        """
        own = gradient[position - first :] if self.spans is None else self._in_slots(gradient, position, first)
        nothing = self.size - position - len(own)
        return torch.cat([own, own.new_zeros(nothing, own.shape[1])]) if nothing else own

    def _in_slots(self, gradient: Tensor, position: int, first: int) -> Tensor:
        assert self.spans is not None
        width = self.spans.slots * gradient.shape[1]
        if not len(gradient):
            return gradient.new_zeros(0, width)
        index, share = (x[position:].to(gradient.device) for x in (self.spans.index, self.spans.share))
        # What lies before ``first`` has a share of 0 here.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        found = gradient[(index - first).clamp(min=0)].to(dtype) * share.to(dtype).unsqueeze(-1)
        alone = self.spans.slots - 1
        rest = found[:, alone:].sum(1, keepdim=True)
        return torch.cat([found[:, :alone], rest], dim=1).reshape(-1, width).to(gradient.dtype)
