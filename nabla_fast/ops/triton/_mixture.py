# mypy: allow-untyped-defs, allow-incomplete-defs
"""Launches around the products of `soft_embedding`, forward and backward, from a recorded softmax.

Everything is relative to the row's likeliest token t: a mixture is T_t + offset, offset = sum_(v != t) p_v (T_v - T_t),
and D = G - G_t has the mean <p, D> = <vector, offset>, which needs no pass over the vocabulary. Both are made of the
other tokens' weights alone, so that they keep their digits where t is nearly certain. The weights are
e_v = exp((z_v - max z) / tau), which the product sees rounded, so it is scaled by how much of their sum it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import counters, last_to_arrive, launch
from nabla_fast.ops.triton._matmul import Bases, cap_slope, capped, products, tile_shape
from nabla_fast.ops.triton._softmax import load_row
from nabla_fast.ops.types import Head


@triton.jit(do_not_specialize=["rows"])
def _others_kernel(
    Z,
    Z_n,
    Z_v,
    BASES,
    TOP,
    TOKEN,
    HIGH,
    HIGH_n,
    LOW,
    LOW_n,
    SUMS,
    PARTS,
    COUNTER,
    rows,
    V,
    inv_tau,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = load_row(Z, row * Z_n, columns, Z_v, inside, float("-inf"))
    top = tl.load(TOP + row)
    if BASES is not None:  # z is e of another base
        e = z * tl.exp((tl.load(BASES + columns // WIDTH * rows + row, mask=inside, other=0.0) - top) * inv_tau)
    else:
        e = tl.exp((z - top) * inv_tau)
    e = tl.where(inside & (columns != tl.load(TOKEN + row)), e, 0.0)
    high = e.to(HIGH.dtype.element_ty)
    tl.store(HIGH + row * HIGH_n + columns, high, mask=inside)
    written = high.to(tl.float32)
    if LOW is not None:
        low = (e - written).to(LOW.dtype.element_ty)
        tl.store(LOW + row * LOW_n + columns, low, mask=inside)
        written += low.to(tl.float32)
    at = PARTS + 2 * row * blocks
    tl.store(at + tl.program_id(1), tl.sum(e, axis=0))
    tl.store(at + blocks + tl.program_id(1), tl.sum(written, axis=0))
    if last_to_arrive(COUNTER + row, blocks):
        part = tl.arange(0, BLOCKS)
        exact = tl.load(at + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
        seen = tl.load(at + blocks + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
        tl.store(SUMS + 2 * row, tl.sum(exact, axis=0))
        tl.store(SUMS + 2 * row + 1, tl.sum(seen, axis=0))


def write_others(
    out: Sequence[Tensor], z: Tensor, inv_tau: float, top: Tensor, token: Tensor, bases: Bases | None = None
) -> Tensor:
    """Writes e of all tokens but the likeliest into ``out``, one or two (R, V) that add up to it.

    With ``bases``, z holds e already, relative to them, and may be ``out``.

    Returns:
        (R, 2), the sum of e, and of what was written.
    """
    rows, vocabulary = z.shape
    block = 4096
    blocks = triton.cdiv(vocabulary, block)
    low = out[1] if len(out) > 1 else None
    sums = torch.empty(rows, 2, dtype=torch.float32, device=z.device)
    parts = torch.empty(rows, 2, blocks, dtype=torch.float32, device=z.device)
    launch(
        _others_kernel, (rows, blocks), z.device,
        (
            z, *z.stride(), None if bases is None else bases.values, top, token,
            out[0], out[0].stride(0), low, 0 if low is None else low.stride(0), sums,
            parts, counters(rows, z.device), rows, vocabulary, inv_tau,
        ),
        {"WIDTH": 1 if bases is None else bases.width, "BLOCK": block, "BLOCKS": triton.next_power_of_2(blocks)},
    )  # fmt: skip
    return sums


@triton.jit
def _mixture_kernel(PRODUCT, P_n, TABLE, T_v, T_d, TOKEN, SUMS, OUT, OFFSET, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    total = tl.load(SUMS + 2 * row)
    seen = tl.load(SUMS + 2 * row + 1)
    token = tl.load(TOKEN + row)
    at = TABLE + tl.maximum(token, 0) * T_v + depth.to(tl.int64) * T_d
    likeliest = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(PRODUCT + row * P_n + depth, mask=inside, other=0.0)
    others *= tl.where(seen > 0, total / seen, 1.0)
    offset = (others - total * likeliest) / (1.0 + total)
    offset = tl.where(token < 0, float("nan"), offset)
    tl.store(OUT + row * D + depth, likeliest + offset, mask=inside)
    if OFFSET is not None:
        tl.store(OFFSET + row * D + depth, offset, mask=inside)


def write_mixture(
    out: Tensor, offset: Tensor | None, product: Tensor, table: Tensor, token: Tensor, sums: Tensor
) -> None:
    """The mixture (R, e) and its offset from the product of the other tokens' weights; ``out`` may be ``product``."""
    rows, width = out.shape
    launch(
        _mixture_kernel, (rows, triton.cdiv(width, 1024)), out.device,
        (product, product.stride(0), table, *table.stride(), token, sums, out, offset, width), {"BD": 1024},
    )  # fmt: skip


@triton.jit
def _mean_kernel(X, X_n, X_d, OFFSET, TABLE, T_v, T_d, TOKEN, G, G_n, ROUNDED, ORIGIN, Q, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.maximum(tl.load(TOKEN + row), 0)
    mean = tl.zeros([BD], tl.float32)
    origin = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        depth = start + tl.arange(0, BD)
        inside = depth < D
        x = load_row(X, row * X_n, depth, X_d, inside, 0.0)
        if ROUNDED is not None:
            half = x.to(ROUNDED.dtype.element_ty)
            tl.store(ROUNDED + row * D + depth, half, mask=inside)
            x = half.to(tl.float32)
        mean += x * load_row(OFFSET, row * D, depth, 1, inside, 0.0)
        if G is None:
            origin += x * load_row(TABLE, token * T_v, depth, T_d, inside, 0.0)
    tl.store(Q + row, tl.sum(mean, axis=0))
    if G is not None:  # noqa: SIM108
        at_token = tl.load(G + row * G_n + token)
    else:
        at_token = tl.sum(origin, axis=0)
    tl.store(ORIGIN + row, tl.where(tl.abs(at_token) < float("inf"), at_token, 0.0))


def mean_of(
    vector: Tensor,
    offset: Tensor,
    table: Tensor,
    token: Tensor,
    *,
    gradient: Tensor | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """G of the likeliest token, read from ``gradient`` (R, V) where that is given, and <p, D>: (R,) each.

    With ``rounded`` (R, e), both of the vector as it is written there.
    """
    rows, width = vector.shape
    origin, q = (torch.empty(rows, dtype=torch.float32, device=vector.device) for _ in range(2))
    launch(
        _mean_kernel, (rows,), vector.device,
        (
            vector, *vector.stride(), offset, table, *table.stride(), token, gradient,
            0 if gradient is None else gradient.stride(0), rounded, origin, q, width,
        ),
        {"BD": 1024},
    )  # fmt: skip
    return origin, q


@triton.jit
def relaxed(z, g, columns, top, inverse, token, origin, q, inv_tau):
    """p (D - q) / tau of a tile of logits z and G."""
    p = tl.exp((z - top) * inv_tau) * inverse
    # Of the likeliest token exactly 0, however its product was summed up.
    d = tl.where(columns == token, 0.0, g - origin)
    # Where p is 0 an infinite G moves nothing; NaN stays.
    return tl.where(p == 0, 0.0, p * (d - q) * inv_tau)


@triton.jit(do_not_specialize=["rows"])
def _relaxed_product_kernel(
    X,
    X_n,
    X_d,
    TABLE,
    T_v,
    T_d,
    D,
    Z,
    Z_n,
    Z_v,
    OUT,
    TOP,
    INVERSE,
    TOKEN,
    ORIGIN,
    Q,
    rows,
    V,
    inv_tau,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    wanted = row < rows
    row = tl.minimum(row, rows - 1)
    entry = tl.minimum(columns, V - 1)
    g = products(X, X_n, X_d, TABLE, T_v, T_d, D, row, entry, BN, BV, BD, EVEN, SWAP, UPCAST)
    z = tl.load(Z + (row * Z_n)[:, None] + (entry.to(tl.int64) * Z_v)[None, :]).to(tl.float32)
    dz = relaxed(
        z, g, columns[None, :], tl.load(TOP + row)[:, None], tl.load(INVERSE + row)[:, None],
        tl.load(TOKEN + row)[:, None], tl.load(ORIGIN + row)[:, None], tl.load(Q + row)[:, None], inv_tau,
    )  # fmt: skip
    at = OUT + (row * V)[:, None] + columns[None, :]
    tl.store(at, dz.to(OUT.dtype.element_ty), mask=wanted[:, None] & (columns < V)[None, :])


def write_relaxed_product(
    out: Tensor,
    z: Tensor,
    x: Tensor,
    table: Tensor,
    inv_tau: float,
    top: Tensor,
    inverse: Tensor,
    token: Tensor,
    origin: Tensor,
    q: Tensor,
) -> None:
    """Writes p (D - q) / tau into ``out`` (N, V), where G = <x, T_v> is made: G is never in memory."""
    rows, width = x.shape
    tiles = tile_shape(rows, z.device)
    launch(
        _relaxed_product_kernel, (triton.cdiv(rows, tiles.BN), triton.cdiv(len(table), tiles.BV)), z.device,
        (
            x, *x.stride(), table, *table.stride(), width, z, *z.stride(), out, top, inverse, token, origin, q, rows,
            len(table), inv_tau,
        ),
        tiles.constants(width), **tiles.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _linear_relaxed_kernel(
    X,
    X_n,
    X_d,
    TABLE,
    T_v,
    T_d,
    D_X,
    H,
    H_n,
    H_d,
    W,
    W_v,
    W_d,
    D,
    scale,
    softcap,
    OUT,
    OUT_n,
    TOP,
    INVERSE,
    TOKEN,
    ORIGIN,
    Q,
    rows,
    V,
    inv_tau,
    CAP: tl.constexpr,
    EVEN_X: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = (row < rows)[:, None] & (columns < V)[None, :]
    row = tl.minimum(row, rows - 1)
    entry = tl.minimum(columns, V - 1)
    g = products(X, X_n, X_d, TABLE, T_v, T_d, D_X, row, entry, BN, BV, BD, EVEN_X, SWAP, UPCAST)
    z = products(H, H_n, H_d, W, W_v, W_d, D, row, entry, BN, BV, BD, EVEN, SWAP, UPCAST)
    z = capped(z, scale, softcap, CAP)
    dz = relaxed(
        z, g, columns[None, :], tl.load(TOP + row)[:, None], tl.load(INVERSE + row)[:, None],
        tl.load(TOKEN + row)[:, None], tl.load(ORIGIN + row)[:, None], tl.load(Q + row)[:, None], inv_tau,
    )  # fmt: skip
    if CAP:
        dz = tl.where(dz == 0, 0.0, dz * cap_slope(z, softcap))
    tl.store(OUT + (row * OUT_n)[:, None] + columns[None, :], dz.to(OUT.dtype.element_ty), mask=inside)


def write_linear_relaxed(
    out: Tensor,
    h: Tensor,
    head: Head,
    x: Tensor,
    table: Tensor,
    inv_tau: float,
    top: Tensor,
    inverse: Tensor,
    token: Tensor,
    origin: Tensor,
    q: Tensor,
) -> None:
    """`write_relaxed_product` for the logits of hidden states h (R, d), made beside G, and the softcap's slope."""
    (rows, width), tiles = x.shape, tile_shape(len(x), h.device)
    launch(
        _linear_relaxed_kernel, (triton.cdiv(rows, tiles.BN), triton.cdiv(len(table), tiles.BV)), h.device,
        (
            x, *x.stride(), table, *table.stride(), width, h, *h.stride(), head.weight, *head.weight.stride(),
            h.shape[1], float(head.scale), float(head.softcap), out, out.stride(0), top, inverse, token, origin, q,
            rows, len(table), inv_tau,
        ),
        {"CAP": head.softcap != 0, "EVEN_X": width % tiles.BD == 0, **tiles.constants(h.shape[1])}, **tiles.options,
    )  # fmt: skip
