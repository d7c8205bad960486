# mypy: allow-untyped-defs, allow-incomplete-defs
"""One read of a part of a row of logits in memory, inside a kernel.

It goes by tiles of TILE x LANES values, TILE of them in each lane. A lane keeps its own running state, so the loop has
no exchange between threads and one extra exponential per TILE values. The argmax costs one comparison per lane and
tile: the winning tile is remembered, and searched once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nabla_fast.ops.triton._softmax import load_row, rescale, shift


@triton.jit
def load_tile(X, row, columns, V, other, MASKED: tl.constexpr):
    at = X.data + row * X.row_stride + columns.to(tl.int64) * X.column_stride
    if MASKED:  # noqa: SIM108
        values = tl.load(at, mask=columns < V, other=other)
    else:
        values = tl.load(at)
    return values.to(tl.float32)


@triton.jit
def _tile(
    Z,
    SOFT,
    HARD,
    G,
    origin,
    target,
    row,
    first,
    within,
    V,
    inv_tau,
    state,
    ENTROPY: tl.constexpr,
    OTHERS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state with one tile more."""
    max, sum_exp, sum_exp_logit, sum_exp_grad, best, won = state
    columns = first + within
    z = load_tile(Z, row, columns, V, float("-inf"), MASKED)
    x = z
    if SOFT is not None:
        x = z + load_tile(SOFT, row, columns, V, 0.0, MASKED)
    top = tl.max(x, axis=0)
    new_max = tl.maximum(max, top)
    base = shift(new_max)
    sum_exp, sum_exp_logit, sum_exp_grad = rescale(max, sum_exp, sum_exp_logit, sum_exp_grad, base, inv_tau)
    # In powers of two: one multiplication less per value.
    difference = (x - base[None, :]) * (inv_tau * 1.4426950408889634)
    e = tl.exp2(difference)
    sum_exp += tl.sum(e, axis=0)
    if ENTROPY:
        # Where e is 0 the difference may be -inf; any other number does as well there.
        sum_exp_logit += 0.6931471805599453 * tl.sum(e * tl.maximum(difference, -1e4), axis=0)
    if G is not None:
        gradient = load_tile(G, row, columns, V, 0.0, MASKED) - origin
        sum_exp_grad += tl.sum(tl.where(e > 0, e * gradient, 0.0), axis=0)
    if OTHERS:
        sum_exp_grad += tl.sum(tl.where(columns == target, 0.0, e), axis=0)
    high = top
    if HARD is not None:
        y = z + load_tile(HARD, row, columns, V, 0.0, MASKED)
        high = tl.max(tl.where(y == y, y, float("inf")), axis=0)  # NaN is as bad as +inf, and a maximum drops it
    elif SOFT is not None:
        high = tl.max(z, axis=0)
    won = tl.where(high > best, first, won)
    return new_max, sum_exp, sum_exp_logit, sum_exp_grad, tl.maximum(best, high), won


@triton.jit
def scan_row(
    Z,
    SOFT,
    HARD,
    G,
    origin,
    target,
    row,
    start,
    end,
    V,
    inv_tau,
    ENTROPY: tl.constexpr,
    OTHERS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """The state of the entries from ``start`` to ``end``: the six fields (`_softmax`).

    With OTHERS the sum with a gradient is that of e over all entries but ``target``.
    """
    within = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lowest = tl.full([LANES], float("-inf"), tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    state = (lowest, zeros, zeros, zeros, lowest, tl.zeros([LANES], tl.int32))
    whole = start + (end - start) // (TILE * LANES) * (TILE * LANES)
    for first in range(start, whole, TILE * LANES):
        state = _tile(Z, SOFT, HARD, G, origin, target, row, first, within, V, inv_tau, state, ENTROPY, OTHERS, False)
    if whole < end:
        state = _tile(Z, SOFT, HARD, G, origin, target, row, whole, within, V, inv_tau, state, ENTROPY, OTHERS, True)

    max, sum_exp, sum_exp_logit, sum_exp_grad, best, won = state
    top = tl.max(max, axis=0)
    sum_exp, sum_exp_logit, sum_exp_grad = rescale(max, sum_exp, sum_exp_logit, sum_exp_grad, shift(top), inv_tau)
    highest = tl.max(best, axis=0)
    # Tiles are ranges of the vocabulary in order, so the lowest index of the maximum lies in the first tile that won.
    columns = tl.min(tl.where(best == highest, won, V), axis=0) + within
    inside = columns < V
    y = load_row(Z, row, columns, inside, float("-inf"))
    if HARD is not None:
        y += load_row(HARD, row, columns, inside, 0.0)
    token = tl.min(tl.min(tl.where((y == highest) & inside, columns, 2147483647), axis=1), axis=0)
    return top, tl.sum(sum_exp, axis=0), tl.sum(sum_exp_logit, axis=0), tl.sum(sum_exp_grad, axis=0), token, highest
