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

from nabla_fast.ops.triton._launch import counters, last_to_arrive, launch, matrix
from nabla_fast.ops.triton._matmul import Bases, cap_slope, capped, products, tile_shape
from nabla_fast.ops.triton._softmax import RowOutputs, load_row, put_parts
from nabla_fast.ops.types import Head


@triton.jit(do_not_specialize=["rows"])
def _others_kernel(
    Z,
    BASES,
    ROW,
    HIGH,
    LOW,
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
    z = load_row(Z, row, columns, inside, float("-inf"))
    top = tl.load(ROW.top + row)
    if BASES is not None:  # z is e of another base
        e = z * tl.exp((tl.load(BASES + columns // WIDTH * rows + row, mask=inside, other=0.0) - top) * inv_tau)
    else:
        e = tl.exp((z - top) * inv_tau)
    e = tl.where(inside & (columns != tl.load(ROW.token + row)), e, 0.0)
    written = put_parts(HIGH, LOW, row, columns, inside, e)
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
    out: Sequence[Tensor], z: Tensor, inv_tau: float, row: RowOutputs, bases: Bases | None = None
) -> Tensor:
    """Writes e of all tokens but the likeliest into ``out``, one or two (R, V) that add up to it.

    With ``bases``, z holds e already, relative to them, and may be ``out``.

    Returns:
        (R, 2), the sum of e, and of what was written.
    """
    (rows, vocabulary), block = z.shape, 4096
    blocks = triton.cdiv(vocabulary, block)
    values, width = bases or (None, 1)
    sums = torch.empty(rows, 2, dtype=torch.float32, device=z.device)
    parts = torch.empty(rows, 2, blocks, dtype=torch.float32, device=z.device)
    high, low = (*map(matrix, out), None)[:2]
    launch(
        _others_kernel, (rows, blocks), z.device,
        (matrix(z), values, row, high, low, sums, parts, counters(rows, z.device), rows, vocabulary, inv_tau),
        {"WIDTH": width, "BLOCK": block, "BLOCKS": triton.next_power_of_2(blocks)},
    )  # fmt: skip
    return sums


@triton.jit
def _mixture_kernel(PRODUCT, TABLE, TOKEN, SUMS, OUT, OFFSET, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    total = tl.load(SUMS + 2 * row)
    seen = tl.load(SUMS + 2 * row + 1)
    token = tl.load(TOKEN + row)
    likeliest = load_row(TABLE, tl.maximum(token, 0), depth, inside, 0.0)
    others = load_row(PRODUCT, row, depth, inside, 0.0)
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
        (matrix(product), matrix(table), token, sums, out, offset, width), {"BD": 1024},
    )  # fmt: skip


@triton.jit
def _mean_kernel(X, OFFSET, TABLE, G, ROUNDED, ROW, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.maximum(tl.load(ROW.token + row), 0)
    mean = tl.zeros([BD], tl.float32)
    origin = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        depth = start + tl.arange(0, BD)
        inside = depth < D
        x = load_row(X, row, depth, inside, 0.0)
        if ROUNDED is not None:
            half = x.to(ROUNDED.dtype.element_ty)
            tl.store(ROUNDED + row * D + depth, half, mask=inside)
            x = half.to(tl.float32)
        mean += x * load_row(OFFSET, row, depth, inside, 0.0)
        if G is None:
            origin += x * load_row(TABLE, token, depth, inside, 0.0)
    tl.store(ROW.q + row, tl.sum(mean, axis=0))
    if G is not None:  # noqa: SIM108
        at_token = tl.load(G.data + row * G.row_stride + token)
    else:
        at_token = tl.sum(origin, axis=0)
    tl.store(ROW.origin + row, tl.where(tl.abs(at_token) < float("inf"), at_token, 0.0))


def with_mean(
    row: RowOutputs,
    vector: Tensor,
    offset: Tensor,
    table: Tensor,
    *,
    gradient: Tensor | None = None,
    rounded: Tensor | None = None,
) -> RowOutputs:
    """``row`` with G of the likeliest token, read from ``gradient`` (R, V) where that is given, and <p, D>.

    With ``rounded`` (R, e), both of the vector as it is written there.
    """
    rows, width = vector.shape
    origin, q = (torch.empty(rows, dtype=torch.float32, device=vector.device) for _ in range(2))
    row = row._replace(origin=origin, q=q)
    if rows:
        launch(
            _mean_kernel, (rows,), vector.device,
            (*map(matrix, (vector, offset, table, gradient)), rounded, row, width), {"BD": 1024},
        )  # fmt: skip
    return row


@triton.jit(do_not_specialize=["rows"])
def _relaxed_kernel(
    X,
    TABLE,
    D_X,
    Z,
    H,
    W,
    D,
    scale,
    softcap,
    OUT,
    ROW,
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
    wanted = row < rows
    # Where the mask is made decides on registers: behind one product, before two.
    if Z is None:
        inside = wanted[:, None] & (columns < V)[None, :]
    row = tl.minimum(row, rows - 1)
    entry = tl.minimum(columns, V - 1)
    g = products(X, TABLE, D_X, row, entry, BN, BV, BD, EVEN_X, SWAP, UPCAST)
    if Z is not None:
        at = Z.data + (row * Z.row_stride)[:, None] + (entry.to(tl.int64) * Z.column_stride)[None, :]
        z = tl.load(at).to(tl.float32)
    else:
        z = capped(products(H, W, D, row, entry, BN, BV, BD, EVEN, SWAP, UPCAST), scale, softcap, CAP)
    p = tl.exp((z - tl.load(ROW.top + row)[:, None]) * inv_tau) * tl.load(ROW.max_prob + row)[:, None]
    # Of the likeliest token exactly 0, however its product was summed up.
    likeliest = columns[None, :] == tl.load(ROW.token + row)[:, None]
    d = tl.where(likeliest, 0.0, g - tl.load(ROW.origin + row)[:, None])
    # Where p is 0 an infinite G moves nothing; NaN stays.
    dz = tl.where(p == 0, 0.0, p * (d - tl.load(ROW.q + row)[:, None]) * inv_tau)
    if CAP:
        dz = tl.where(dz == 0, 0.0, dz * cap_slope(z, softcap))
    if Z is not None:
        inside = wanted[:, None] & (columns < V)[None, :]
    place = OUT.data + (row * OUT.row_stride)[:, None] + columns[None, :]
    tl.store(place, dz.to(OUT.data.dtype.element_ty), mask=inside)


def write_relaxed(
    out: Tensor,
    z: Tensor | None,
    x: Tensor,
    table: Tensor,
    inv_tau: float,
    row: RowOutputs,
    h: Tensor | None = None,
    head: Head | None = None,
) -> None:
    """Writes p (D - q) / tau into ``out`` (N, V), where G = <x, T_v> is made: G is never in memory.

    Without logits ``z``, they are made beside G from hidden states h (N, d), and the softcap's slope is a factor more.
    """
    (rows, width), tiles = x.shape, tile_shape(len(x), x.device)
    weight, scale, softcap = head or (None, 0.0, 0.0)
    depth = 0 if h is None else h.shape[1]
    launch(
        _relaxed_kernel, (triton.cdiv(rows, tiles.BN), triton.cdiv(len(table), tiles.BV)), x.device,
        (
            matrix(x), matrix(table), width, *map(matrix, (z, h, weight)), depth, float(scale), float(softcap),
            matrix(out), row, rows, len(table), inv_tau,
        ),
        {"CAP": softcap != 0, "EVEN_X": width % tiles.BD == 0, **tiles.constants(depth)}, **tiles.options,
    )  # fmt: skip
