# mypy: allow-untyped-defs, allow-incomplete-defs
"""The online softmax state of rows whose logits are computed tile by tile, with the gradient's sums beside it.

The vocabulary is split over the grid's second axis, rows over the first, so that all row blocks meet the same part of
W while it lies in the cache. Each program keeps BN states and never writes a logit. Reads: W once per row block (from
memory once in all, as long as the row blocks of a part run together), each table of the gradient likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import run, split, strides
from nabla_fast.ops.triton.online import new_state, rescale, shift, store_state
from nabla_fast.ops.triton.sources import NO_GRADIENT, Gradient, Logits, tile_arguments
from nabla_fast.ops.triton.tiles import load_tile, tile


@triton.jit
def _linear_state_kernel(
    Z,
    Z_n,
    Z_v,
    H,
    H_n,
    H_d,
    W,
    W_v,
    W_d,
    D,
    A,
    X1,
    T1,
    T1_v,
    T1_d,
    D1,
    X2,
    T2,
    T2_v,
    T2_d,
    D2,
    G,
    G_n,
    G_v,
    scale,
    softcap,
    alpha,
    SOFT,
    SOFT_n,
    SOFT_v,
    HARD,
    HARD_n,
    HARD_v,
    HELD,
    STATE,
    TOKENS,
    rows,
    V,
    size,
    inv_tau,
    ENTROPY: tl.constexpr,
    WITH_G: tl.constexpr,
    MOMENTS: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_A: tl.constexpr,
    MODE_1: tl.constexpr,
    MODE_2: tl.constexpr,
    CAP: tl.constexpr,
    CAP_A: tl.constexpr,
    OWN: tl.constexpr,
):
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = row < rows
    if HELD is not None:
        wanted = wanted & (tl.load(HELD + row, mask=wanted, other=1) == 0)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    clamped = tl.minimum(row, rows - 1)
    m = tl.full([BN], float("-inf"), tl.float32)
    s = tl.zeros([BN], tl.float32)
    t = tl.zeros([BN], tl.float32)
    q = tl.zeros([BN], tl.float32)
    y_max = tl.full([BN], float("-inf"), tl.float32)
    token = tl.zeros([BN], tl.int32)
    start = split * size
    for first in range(start, tl.minimum(start + size, V), BV):
        columns = first + tl.arange(0, BV)
        inside = wanted[:, None] & (columns < V)[None, :]
        z, g = tile(
            Z, Z_n, Z_v, H, H_n, H_d, W, W_v, W_d, D, A, X1, T1, T1_v, T1_d, D1, X2, T2, T2_v, T2_d, D2, G, G_n, G_v,
            scale, softcap, alpha, clamped, columns, inside, V,
            BN, BV, BD, EVEN, SWAP, MODE_H, MODE_A, MODE_1, MODE_2, CAP, CAP_A, OWN,
        )  # fmt: skip
        x = z
        if SOFT is not None:
            x = z + load_tile(SOFT, clamped, SOFT_n, columns, SOFT_v, inside, 0.0)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        base = shift(m_new)
        if MOMENTS:
            # t and q are the mean of G and its sum of squared deviations: no cancellation, whatever the mean.
            s = s * tl.exp((m - base) * inv_tau)
            before = (first - start).to(tl.float32)
            now = tl.minimum(V - first, BV).to(tl.float32)
            mean = tl.sum(tl.where(inside, g, 0.0), axis=1) / now
            away = tl.where(inside, g - mean[:, None], 0.0)
            gap = mean - t
            q += tl.sum(away * away, axis=1) + gap * gap * (before * now / (before + now))
            t += gap * (now / (before + now))
        else:
            s, t, q = rescale(m, s, t, q, base, inv_tau)
        m = m_new
        difference = (x - base[:, None]) * inv_tau
        e = tl.exp(difference)
        s += tl.sum(e, axis=1)
        if ENTROPY:
            t += tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
        if WITH_G:
            q += tl.sum(tl.where(e > 0, e * g, 0.0), axis=1)
        y = z
        if HARD is not None:
            y = z + load_tile(HARD, clamped, HARD_n, columns, HARD_v, inside, 0.0)
        high = tl.max(y, axis=1)
        lowest = tl.min(tl.where(y == high[:, None], tl.arange(0, BV)[None, :], BV), axis=1)
        token = tl.where(high > y_max, first + lowest, token)
        y_max = tl.maximum(y_max, high)
    store_state(STATE, TOKENS, split, tl.num_programs(1), row, rows, wanted, m, s, t, q, y_max, token)


def linear_state(
    logits: Logits,
    inv_tau: float,
    gradient: Gradient = NO_GRADIENT,
    *,
    entropy: bool = False,
    moments: bool = False,
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    held: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], int]:
    """Partial states of ``softmax((logits + soft) / tau)``, and the length of the vocabulary's parts.

    With a gradient, q is sum e G; with ``moments``, t and q are G's mean and sum of squared deviations. Rows with
    ``held`` set keep what ``state`` has.
    """
    rows, vocabulary = logits.rows, logits.vocabulary
    arguments, options = tile_arguments(logits, gradient, (soft is not None) + (hard is not None))
    blocks = triton.cdiv(rows, options["BN"])
    size, splits = split(vocabulary, options["BV"], blocks, logits.device)
    state = state or new_state(splits, rows, logits.device)
    if rows:
        run(
            _linear_state_kernel, (blocks, splits), logits.device, **arguments, **options,
            SOFT=soft, **strides("SOFT", soft, "nv"), HARD=hard, **strides("HARD", hard, "nv"),
            HELD=held, STATE=state[0], TOKENS=state[1], size=size, inv_tau=inv_tau,
            ENTROPY=entropy, WITH_G=gradient is not NO_GRADIENT and not moments, MOMENTS=moments,
        )  # fmt: skip
    return state, size
