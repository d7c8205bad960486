# mypy: allow-untyped-defs, allow-incomplete-defs
"""The online softmax state of rows of logits (N, V) that lie in memory.

One read of the logits: a tile of TILE x LANES values a time, TILE of them in each lane. A lane keeps its own running
state, so the loop has no exchange between threads and one extra exponential per TILE values. The argmax costs one
comparison per lane and tile: the winning tile is remembered, and searched once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import run, split, strides
from nabla_fast.ops.triton.online import new_state, rescale, shift, store_state


@triton.jit
def load_row(X, offset, columns, stride, inside, other):
    """Values of one row in float32."""
    return tl.load(X + offset + columns.to(tl.int64) * stride, mask=inside, other=other).to(tl.float32)


@triton.jit
def _load(X, offset, columns, stride, V, other, MASKED: tl.constexpr):
    at = X + offset + columns.to(tl.int64) * stride
    if MASKED:  # noqa: SIM108
        values = tl.load(at, mask=columns < V, other=other)
    else:
        values = tl.load(at)
    return values.to(tl.float32)


@triton.jit
def _tile(
    Z,
    Z_n,
    Z_v,
    SOFT,
    SOFT_n,
    SOFT_v,
    HARD,
    HARD_n,
    HARD_v,
    G,
    G_n,
    G_v,
    origin,
    row,
    first,
    within,
    V,
    inv_tau,
    m,
    s,
    t,
    q,
    y_max,
    won,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state with one tile more."""
    columns = first + within
    z = _load(Z, row * Z_n, columns, Z_v, V, float("-inf"), MASKED)
    x = z
    if SOFT is not None:
        x = z + _load(SOFT, row * SOFT_n, columns, SOFT_v, V, 0.0, MASKED)
    top = tl.max(x, axis=0)
    m_new = tl.maximum(m, top)
    base = shift(m_new)
    s, t, q = rescale(m, s, t, q, base, inv_tau)
    # In powers of two: one multiplication less per value.
    difference = (x - base[None, :]) * (inv_tau * 1.4426950408889634)
    e = tl.exp2(difference)
    s += tl.sum(e, axis=0)
    if ENTROPY:
        # Where e is 0 the difference may be -inf; any other number does as well there.
        t += 0.6931471805599453 * tl.sum(e * tl.maximum(difference, -1e4), axis=0)
    if G is not None:
        gradient = _load(G, row * G_n, columns, G_v, V, 0.0, MASKED) - origin
        q += tl.sum(tl.where(e > 0, e * gradient, 0.0), axis=0)
    high = top
    if HARD is not None:
        y = z + _load(HARD, row * HARD_n, columns, HARD_v, V, 0.0, MASKED)
        high = tl.max(tl.where(y == y, y, float("inf")), axis=0)  # NaN is as bad as +inf, and a maximum drops it
    elif SOFT is not None:
        high = tl.max(z, axis=0)
    won = tl.where(high > y_max, first, won)
    return m_new, s, t, q, tl.maximum(y_max, high), won


@triton.jit(do_not_specialize=["rows"])
def _row_state_kernel(
    Z,
    Z_n,
    Z_v,
    SOFT,
    SOFT_n,
    SOFT_v,
    HARD,
    HARD_n,
    HARD_v,
    G,
    G_n,
    G_v,
    ORIGIN,
    HELD,
    STATE,
    TOKENS,
    rows,
    V,
    size,
    inv_tau,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if HELD is not None:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if tl.load(HELD + row) != 0:
            return
    within = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    y_max = tl.full([LANES], float("-inf"), tl.float32)
    won = tl.zeros([LANES], tl.int32)
    origin = 0.0
    if G is not None:
        origin = tl.load(ORIGIN + row)
    start = split * size
    end = tl.minimum(start + size, V)
    whole = start + (end - start) // (TILE * LANES) * (TILE * LANES)
    for first in range(start, whole, TILE * LANES):
        m, s, t, q, y_max, won = _tile(
            Z, Z_n, Z_v, SOFT, SOFT_n, SOFT_v, HARD, HARD_n, HARD_v, G, G_n, G_v, origin, row, first, within, V,
            inv_tau, m, s, t, q, y_max, won, ENTROPY, False,
        )  # fmt: skip
    if whole < end:
        m, s, t, q, y_max, won = _tile(
            Z, Z_n, Z_v, SOFT, SOFT_n, SOFT_v, HARD, HARD_n, HARD_v, G, G_n, G_v, origin, row, whole, within, V,
            inv_tau, m, s, t, q, y_max, won, ENTROPY, True,
        )  # fmt: skip

    top = tl.max(m, axis=0)
    s, t, q = rescale(m, s, t, q, shift(top), inv_tau)
    best = tl.max(y_max, axis=0)
    # Tiles are ranges of the vocabulary in order, so the lowest index of the maximum lies in the first tile that won.
    columns = tl.min(tl.where(y_max == best, won, V), axis=0) + within
    inside = columns < V
    y = load_row(Z, row * Z_n, columns, Z_v, inside, float("-inf"))
    if HARD is not None:
        y += load_row(HARD, row * HARD_n, columns, HARD_v, inside, 0.0)
    token = tl.min(tl.min(tl.where((y == best) & inside, columns, 2147483647), axis=1), axis=0)
    store_state(
        STATE, TOKENS, split, tl.num_programs(1), row, rows, None,
        top, tl.sum(s, axis=0), tl.sum(t, axis=0), tl.sum(q, axis=0), best, token,
    )  # fmt: skip


def row_state(
    z: Tensor,
    inv_tau: float,
    *,
    entropy: bool = False,
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    gradient: Tensor | None = None,
    origin: Tensor | None = None,
    held: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial states of ``softmax((z + soft) / tau)``, hard tokens of z + hard, sums with a dense gradient.

    The gradient is taken relative to ``origin`` (N,), its value at the row's likeliest token: only differences matter,
    and G - <p, G> would cancel where that token is nearly certain. Rows with ``held`` set keep what ``state`` has. One
    program per row where rows are many, else several per row.
    """
    rows, vocabulary = z.shape
    # 16 bytes per thread and row of the tile, so that a lane's values stay within one thread.
    # Further operands take registers: half the tile.
    lanes = 1024 if z.element_size() == 2 else 512
    tile = 8 if soft is None and hard is None and gradient is None else 4
    size, splits = split(vocabulary, tile * lanes, rows, z.device, waves=4)
    state = state or new_state(splits, rows, z.device)
    if rows:
        run(
            _row_state_kernel, (rows, splits), z.device,
            Z=z, **strides("Z", z, "nv"), SOFT=soft, **strides("SOFT", soft, "nv"),
            HARD=hard, **strides("HARD", hard, "nv"), G=gradient, **strides("G", gradient, "nv"), ORIGIN=origin,
            HELD=held, STATE=state[0], TOKENS=state[1], rows=rows, V=vocabulary, size=size, inv_tau=inv_tau,
            ENTROPY=entropy, TILE=tile, LANES=lanes, num_warps=4,
        )  # fmt: skip
    return state
