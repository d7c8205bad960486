# mypy: allow-untyped-defs, allow-incomplete-defs
"""A tile of logits, computed or loaded, and of the gradient G over the vocabulary: BN rows by BV entries.

    z = softcap tanh(scale <h, W_v> / softcap)      G = <a, W_v> + <x1, T1_v> + <x2, T2_v>, or a dense G

The vector ``a`` shares the read of W with h. Products accumulate in float32; nothing is rounded to half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(a, b, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    if SWAP:
        acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr, SWAP: tl.constexpr):
    """acc + a @ b^T for a (BN, depth) of vectors and b (BV, depth) of a table; acc is (BV, BN) with SWAP.

    native: both half precision. split: float32 vectors as a sum of two bfloat16, which loses 2^-18 at most.
    tf32x3: float32 products. interpret: the interpreter multiplies float32 only.
    """
    if MODE == "native":
        acc = _multiply(a, b, acc, SWAP, "ieee")
    elif MODE == "split":
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        acc = _multiply(high, b, acc, SWAP, "ieee")
        acc = _multiply(low, b, acc, SWAP, "ieee")
    elif MODE == "tf32x3":
        acc = _multiply(a.to(tl.float32), b.to(tl.float32), acc, SWAP, "tf32x3")
    else:
        acc = _multiply(a.to(tl.float32), b.to(tl.float32), acc, SWAP, "ieee")
    return acc


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
    A,
    A_n,
    A_d,
    X,
    T,
    T_v,
    T_d,
    D,
    row,
    entry,
    acc,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    MODE: tl.constexpr,
    MODE_X: tl.constexpr,
    SWAP: tl.constexpr,
):
    """(<A_n, T_v>, acc + <X_n, T_v>) for rows ``row`` and entries ``entry``; X is contiguous, either may be None."""
    first = tl.zeros_like(acc)
    a_rows = row * A_n
    t_rows = entry.to(tl.int64) * T_v
    for start in range(0, D, BD):
        depth = start + tl.arange(0, BD)
        table = _load_depth(T, t_rows, depth, T_d, D, EVEN)
        if A is not None:
            first = dot(_load_depth(A, a_rows, depth, A_d, D, EVEN), table, first, MODE, SWAP)
        if X is not None:
            acc = dot(_load_depth(X, row * D, depth, 1, D, EVEN), table, acc, MODE_X, SWAP)
    return first, acc


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


@triton.jit
def load_tile(X, row, X_n, columns, X_v, inside, other):
    """(BN, BV) values in float32; ``row`` are int64 row indices."""
    at = X + (row * X_n)[:, None] + (columns.to(tl.int64) * X_v)[None, :]
    return tl.load(at, mask=inside, other=other).to(tl.float32)


@triton.jit
def tile(
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
    row,
    columns,
    inside,
    V,
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
    """(z, G) of a tile, z = -inf outside the vocabulary. CAP_A: alpha * logits(a) for <a, W_v>. OWN: plus alpha * z."""
    entry = tl.minimum(columns, V - 1)
    if SWAP:  # noqa: SIM108
        g = tl.zeros([BV, BN], tl.float32)
    else:
        g = tl.zeros([BN, BV], tl.float32)
    z = g
    if MODE_H != "none" or MODE_A != "none":
        z, g = products(H, H_n, H_d, A, W, W_v, W_d, D, row, entry, g, BD, EVEN, MODE_H, MODE_A, SWAP)
        z = capped(z, scale, softcap, CAP)
        if CAP_A:
            g = alpha * capped(g, scale, softcap, CAP)
    if OWN:
        g += alpha * z
    if X1 is not None:
        g = products(None, 0, 0, X1, T1, T1_v, T1_d, D1, row, entry, g, BD, EVEN, "none", MODE_1, SWAP)[1]
    if X2 is not None:
        g = products(None, 0, 0, X2, T2, T2_v, T2_d, D2, row, entry, g, BD, EVEN, "none", MODE_2, SWAP)[1]
    if SWAP:
        z = tl.trans(z)
        g = tl.trans(g)
    if Z is not None:
        z = load_tile(Z, row, Z_n, columns, Z_v, inside, float("-inf"))
    if G is not None:
        g = load_tile(G, row, G_n, columns, G_v, inside, 0.0)
    return tl.where(inside, z, float("-inf")), g
