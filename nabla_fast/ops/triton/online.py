# mypy: allow-untyped-defs, allow-incomplete-defs
"""Online softmax: a running maximum, and sums relative to it; partial states and how they are merged.

A state has five numbers: m the maximum of x, s = sum e, t = sum e (x - m) / tau, q = sum e G with
e = exp((x - m) / tau), and y the maximum of the values whose argmax is the hard token. Differences are taken before
the division by tau, so logits of 1e4 at tau = 0.05 lose nothing. A NaN or +inf needs no flag of its own: it makes s
NaN, and s stays NaN (``tl.max`` drops NaN, ``tl.sum`` does not), and y is +inf where such a value has a NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 5


def new_state(splits: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the partial states, (fields, splits, N), and their hard tokens, (splits, N)."""
    state = torch.empty(FIELDS, splits, rows, dtype=torch.float32, device=device)
    return state, torch.empty(splits, rows, dtype=torch.int32, device=device)


@triton.jit
def shift(m):
    """What to subtract: the maximum, or 0 where nothing but -inf was seen (-inf - -inf would be NaN)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def rescale(m, s, t, q, base, inv_tau):
    """A state's sums, relative to ``base`` now."""
    factor = tl.exp((m - base) * inv_tau)
    moved = tl.where(s > 0, (m - base) * inv_tau, 0.0)
    return s * factor, (t + moved * s) * factor, q * factor


@triton.jit
def store_state(STATE, TOKENS, split, splits, row, rows, mask, m, s, t, q, y, token):
    """Writes one split's state of one row, or of a block of rows."""
    at = STATE + split * rows + row
    field = splits * rows
    tl.store(at, m, mask=mask)
    tl.store(at + field, s, mask=mask)
    tl.store(at + 2 * field, t, mask=mask)
    tl.store(at + 3 * field, q, mask=mask)
    tl.store(at + 4 * field, y, mask=mask)
    tl.store(TOKENS + split * rows + row, token, mask=mask)


@triton.jit
def merge(STATE, TOKENS, row, rows, splits, inv_tau, SPLITS: tl.constexpr):
    """The states of a block of rows, merged over the splits: (m, s, t, q, token); a bad row has token -1."""
    part = tl.arange(0, SPLITS)[None, :]
    inside = (part < splits) & (row < rows)[:, None]
    at = STATE + part * rows + row[:, None]
    field = splits * rows
    m = tl.load(at, mask=inside, other=float("-inf"))
    s = tl.load(at + field, mask=inside, other=0.0)
    t = tl.load(at + 2 * field, mask=inside, other=0.0)
    q = tl.load(at + 3 * field, mask=inside, other=0.0)
    y = tl.load(at + 4 * field, mask=inside, other=float("-inf"))
    token = tl.load(TOKENS + part * rows + row[:, None], mask=inside, other=0)
    top = tl.max(m, axis=1)
    s, t, q = rescale(m, s, t, q, shift(top)[:, None], inv_tau)
    total = tl.sum(s, axis=1)
    best = tl.max(y, axis=1)
    token = tl.min(tl.where(y == best[:, None], token, 2147483647), axis=1)
    good = (total == total) & (tl.abs(top) < float("inf")) & (tl.abs(best) < float("inf"))
    return top, total, tl.sum(t, axis=1), tl.sum(q, axis=1), tl.where(good, token, -1)
