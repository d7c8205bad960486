"""Temperature, top-k and top-p in plain PyTorch, as transformers' warpers have them."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens among which a nucleus is looked for before all are sorted, which takes thirty times as long.
LIKELIEST = 256
# Above it, what float32 makes of the sum over the likeliest tokens no longer tells which of the others belong to them.
NEARLY_ALL = 1 - 1e-4


def warp(z: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits z (N, V), float32 or float64, by a temperature above 0; -inf on what top-k, then top-p remove.

    Tokens as likely as the last that top-k keeps stay, too. Of those as likely as the last in the nucleus, so many
    stay as it takes to reach ``top_p``, from the lowest index on.
    """
    x = z / temperature
    if top_k is not None and top_k < x.shape[-1]:
        kth = x.topk(top_k, dim=-1).values[:, -1:]
        x = x.masked_fill(x < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        x = _nucleus(x, top_p)
    return x


def likeliest(x: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the nucleus of x (N, V) is mostly found.

    Returns:
        Entries (N, C) of the likeliest tokens and the tokens themselves (N, C), in order; which of them are in the
        nucleus (N, C); and whether it may hold other tokens instead or as well (N,).
    """
    count = min(LIKELIEST, x.shape[-1])
    found = x.topk(count, dim=-1)
    # Equals come from topk in any order; here the lowest index comes first.
    tokens, order = found.indices.sort(dim=-1)
    values, order = found.values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    p = x.softmax(-1).gather(-1, tokens)
    inside = p.cumsum(-1) - p < top_p
    cut = (inside & (values == values[:, -1:])).any(-1) & (count < x.shape[-1])
    return values, tokens, inside, cut


def without_tail(x: Tensor, top_p: float) -> Tensor:
    """The nucleus by a sum from the least likely token up, which is exact however little the tail makes."""
    # Backwards, so that a stable sort leaves the lowest of equal tokens to the end.
    index = x.shape[-1] - 1 - x.flip(-1).sort(dim=-1, stable=True).indices
    outside = x.softmax(-1).gather(-1, index).cumsum(-1) <= 1 - top_p
    outside[:, -1] = False
    return x.masked_fill(outside.scatter(-1, index, outside), -torch.inf)


def _nucleus(x: Tensor, top_p: float) -> Tensor:
    """Removes what lies outside the smallest set of tokens whose probability reaches ``top_p``."""
    if top_p > NEARLY_ALL:
        return without_tail(x, top_p)
    values, tokens, inside, cut = likeliest(x, top_p)
    kept = torch.full_like(x, -torch.inf).scatter(-1, tokens, values.masked_fill(~inside, -torch.inf))
    # A row's own matter, so that no other row of the batch changes it.
    rows = cut.nonzero()[:, 0]
    if len(rows):
        kept[rows] = without_tail(x[rows], top_p)
    return kept
