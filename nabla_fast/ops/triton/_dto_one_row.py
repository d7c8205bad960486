# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pass of a latents step for few rows: W is read once, for the logits and for the gradient (identity (b)).

A program keeps BV rows of W in registers, padded to a power of two: they give BV logits, and then, weighted with
e = exp((z - m) / tau), are added to A = sum e G W_v and B = sum e W_v, which are rescaled when the running maximum m
moves. Rows and parts of the vocabulary are the grid; rows of one part run side by side and share its entries of W in
the cache. G is taken relative to its value at the expected token: only differences matter, and A - <p, G> B would
cancel for a row whose token is nearly certain. What leaves a program is its state and 2 d numbers, for each of at most
256 parts: under 1 % of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._gradient import Gradient, at_tokens
from nabla_fast.ops.triton._launch import INTERPRET, launch, matrix, split
from nabla_fast.ops.triton._matmul import cap_slope, capped
from nabla_fast.ops.triton._softmax import FIELDS, load_row, put_fields, shift
from nabla_fast.ops.types import Head

# What BV entries of all tables may take: bytes of one tile, and of all tiles in flight (an A100 has 163 KiB to share).
_TILE_BYTES = 65536
_FLIGHT_BYTES = 98304
# The longest padded table row: 16 warps keep it, and as many sums, in registers.
_DEPTH = 8192


@triton.jit
def _table_rows(T, entry, depth, D, inside):
    at = T.data + (entry.to(tl.int64) * T.row_stride)[:, None] + (depth.to(tl.int64) * T.column_stride)[None, :]
    return tl.load(at, mask=inside[:, None] & (depth < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _one_row_kernel(
    H,
    W,
    D,
    A,
    X1,
    T1,
    D1,
    X2,
    T2,
    D2,
    G,
    ORIGIN,
    scale,
    softcap,
    alpha,
    SOFT,
    HARD,
    HELD,
    STATE,
    SUMS,
    rows,
    V,
    size,
    inv_tau,
    CAP: tl.constexpr,
    CAP_A: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(HELD + row) != 0:
        return
    depth = tl.arange(0, BD)
    h = load_row(H, row, depth, depth < D, 0.0)
    if A is not None:
        a = load_row(A, row, depth, depth < D, 0.0)
    if X1 is not None:
        depth1 = tl.arange(0, BD1)
        x1 = load_row(X1, row, depth1, depth1 < D1, 0.0)
    if X2 is not None:
        depth2 = tl.arange(0, BD2)
        x2 = load_row(X2, row, depth2, depth2 < D2, 0.0)
    origin = tl.load(ORIGIN + row)
    max = float("-inf")
    sum_exp = 0.0
    sum_exp_grad = 0.0
    best = float("-inf")
    token = 0
    weighted = tl.zeros([BD], tl.float32)
    mean = tl.zeros([BD], tl.float32)
    start = split * size
    for first in tl.range(start, tl.minimum(start + size, V), BV, num_stages=STAGES):
        columns = first + tl.arange(0, BV)
        inside = columns < V
        table = _table_rows(W, columns, depth, D, inside)
        z = capped(tl.sum(table * h[None, :], axis=1), scale, softcap, CAP)
        g = tl.zeros([BV], tl.float32)
        if G is not None:
            g = load_row(G, row, columns, inside, 0.0)
        if A is not None:
            g = tl.sum(table * a[None, :], axis=1)
            if CAP_A:
                g = alpha * capped(g, scale, softcap, CAP)
        if X1 is not None:
            g += tl.sum(_table_rows(T1, columns, depth1, D1, inside) * x1[None, :], axis=1)
        if X2 is not None:
            g += tl.sum(_table_rows(T2, columns, depth2, D2, inside) * x2[None, :], axis=1)
        g -= origin
        z = tl.where(inside, z, float("-inf"))
        x = z
        if SOFT is not None:
            x = z + load_row(SOFT, row, columns, inside, 0.0)
        new_max = tl.maximum(max, tl.max(x, axis=0))
        base = shift(new_max)
        factor = tl.exp((max - base) * inv_tau)
        max = new_max
        e = tl.exp((x - base) * inv_tau)
        eg = tl.where(e > 0, e * g, 0.0)
        sum_exp = sum_exp * factor + tl.sum(e, axis=0)
        sum_exp_grad = sum_exp_grad * factor + tl.sum(eg, axis=0)
        if CAP:
            slope = cap_slope(tl.where(inside, z, 0.0), softcap)
            e *= slope
            eg *= slope
        weighted = weighted * factor + tl.sum(table * eg[:, None], axis=0)
        mean = mean * factor + tl.sum(table * e[:, None], axis=0)
        y = z
        if HARD is not None:
            y = z + load_row(HARD, row, columns, inside, 0.0)
            y = tl.where(y == y, y, float("inf"))  # NaN is as bad as +inf, and a maximum drops it
        high = tl.max(y, axis=0)
        lowest = tl.min(tl.where(y == high, columns, 2147483647), axis=0)
        token = tl.where(high > best, lowest, token)
        best = tl.maximum(best, high)
    splits = tl.num_programs(1)
    at = STATE + split * rows + row
    token = tl.cast(token, tl.float32, bitcast=True)
    put_fields(at, splits * rows, None, (max, sum_exp, 0.0, sum_exp_grad, token, best))
    at = SUMS + ((split.to(tl.int64) * rows + row) * 2) * D + depth
    tl.store(at, weighted, mask=depth < D)
    tl.store(at + D, mean, mask=depth < D)


def fits(rows: int, depths: list[int]) -> bool:
    """Whether the pass takes these rows: each row is multiplied by itself, and a table row must fit in registers."""
    return rows <= 4 and all(triton.next_power_of_2(depth) <= _DEPTH for depth in depths)


def one_row_pass(
    h: Tensor,
    head: Head,
    gradient: Gradient,
    tokens: Tensor,
    inv_tau: float,
    soft: Tensor | None,
    hard: Tensor | None,
    held: Tensor,
) -> tuple[Callable[[], None], Tensor, Tensor]:
    """The pass over the head for few rows of latents h (N, d).

    Returns:
        What makes it, for rows that are not ``held``; and what it fills: partial states of the parts, and their sums A
        and B (parts, N, 2, d), relative to the part's maximum.
    """
    rows, weight = len(h), head.weight
    depths = [h.shape[1], *(table.shape[1] for _, table in gradient.terms)]
    padded = [max(16, triton.next_power_of_2(depth)) for depth in depths]
    size = weight.element_size()
    # 4 rows of 4,096 are what the registers take once upcast; 16 would spill.
    block = max(1, min(64, 16384 // padded[0], _TILE_BYTES // (size * sum(padded))))
    block = 2 ** (block.bit_length() - 1)
    stages = min(4, 1 + _FLIGHT_BYTES // (block * size * sum(padded)))
    length, parts = split(len(weight), block, rows, h.device, waves=1)
    state = torch.empty(FIELDS.value, parts, rows, dtype=torch.float32, device=h.device)
    sums = torch.empty(parts, rows, 2, depths[0], dtype=torch.float32, device=h.device)
    terms = [(matrix(vector), matrix(table), table.shape[1]) for vector, table in gradient.terms]
    term1, term2 = [*terms, *[(None, None, 0)] * 2][:2]
    widths = dict(zip(("BD", "BD1", "BD2"), [*padded, 1, 1], strict=False))
    arguments = (
        matrix(h), matrix(weight), depths[0], matrix(gradient.a), *term1, *term2, matrix(gradient.dense),
        at_tokens(gradient, head, tokens), float(head.scale), float(head.softcap), float(gradient.alpha),
        matrix(soft), matrix(hard), held, state, sums, rows, len(weight), length, inv_tau,
    )  # fmt: skip
    constants = {
        "CAP": head.softcap != 0, "CAP_A": gradient.capped, "BV": block, **widths,
        "STAGES": 1 if INTERPRET else stages,
    }  # fmt: skip
    return partial(launch, _one_row_kernel, (rows, parts), h.device, arguments, constants, num_warps=16), state, sums
