# mypy: allow-untyped-defs, allow-incomplete-defs
"""A tile of logits, BN rows by BV entries: z = softcap tanh(scale <h, W_v> / softcap), accumulated in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_depth(X, offsets, depth, stride, D, EVEN: tl.constexpr):
    at = X + offsets[:, None] + (depth.to(tl.int64) * stride)[None, :]
    if EVEN:  # noqa: SIM108
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(depth < D)[None, :], other=0.0)
    return values


@triton.jit
def products(
    H,
    H_n,
    H_d,
    W,
    W_v,
    W_d,
    D,
    row,
    entry,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<H_n, W_v> (BN, BV) for rows ``row`` and entries ``entry``, of one half-precision dtype.

    SWAP: the operands change places, so that the table fills the wide side of the matrix unit. UPCAST: for the
    interpreter, which multiplies float32 only.
    """
    if SWAP:  # noqa: SIM108
        acc = tl.zeros([BV, BN], tl.float32)
    else:
        acc = tl.zeros([BN, BV], tl.float32)
    h_rows = row * H_n
    w_rows = entry.to(tl.int64) * W_v
    for start in range(0, D, BD):
        depth = start + tl.arange(0, BD)
        h = _load_depth(H, h_rows, depth, H_d, D, EVEN)
        w = _load_depth(W, w_rows, depth, W_d, D, EVEN)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        if SWAP:  # noqa: SIM108
            acc = tl.dot(w, tl.trans(h), acc)
        else:
            acc = tl.dot(h, tl.trans(w), acc)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def tanh(x):
    """tanh to float32 rounding, small x too."""
    small = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * ((1.0 - small) / (1.0 + small))
    xx = x * x
    series = x * (1.0 + xx * (-1.0 / 3 + xx * (2.0 / 15 + xx * (-17.0 / 315 + xx * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, large)


@triton.jit
def capped(product, scale, softcap, CAP: tl.constexpr):
    """Logits from products with the head."""
    z = product * scale
    if CAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def cap_slope(z, softcap):
    """d(capped logits) / d(uncapped ones)."""
    ratio = z / softcap
    return 1.0 - ratio * ratio
