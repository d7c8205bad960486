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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._gradient import Gradient, at_tokens
from nabla_fast.ops.triton._launch import INTERPRET, run, split, strides
from nabla_fast.ops.triton._matmul import (
    cap_slope,
    capped,
)
from nabla_fast.ops.triton._softmax import (
    load_row,
    new_state,
    shift,
    store_state,
)
from nabla_fast.ops.types import (
    Head,
)

# What BV entries of all tables may take: bytes of one tile, and of all tiles in flight (an A100 has 163 KiB to share).
_TILE_BYTES = 65536
_FLIGHT_BYTES = 98304
# The longest padded table row: 16 warps keep it, and as many sums, in registers.
_DEPTH = 8192


@triton.jit
def _table_rows(T, T_v, T_d, entry, depth, D, inside):
    at = T + (entry.to(tl.int64) * T_v)[:, None] + (depth.to(tl.int64) * T_d)[None, :]
    return tl.load(at, mask=inside[:, None] & (depth < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _one_row_kernel(
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
    ORIGIN,
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
    h = tl.load(H + row * H_n + depth.to(tl.int64) * H_d, mask=depth < D, other=0.0).to(tl.float32)
    if A is not None:
        a = tl.load(A + row * D + depth, mask=depth < D, other=0.0).to(tl.float32)
    if X1 is not None:
        depth1 = tl.arange(0, BD1)
        x1 = tl.load(X1 + row * D1 + depth1, mask=depth1 < D1, other=0.0).to(tl.float32)
    if X2 is not None:
        depth2 = tl.arange(0, BD2)
        x2 = tl.load(X2 + row * D2 + depth2, mask=depth2 < D2, other=0.0).to(tl.float32)
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
        table = _table_rows(W, W_v, W_d, columns, depth, D, inside)
        z = capped(tl.sum(table * h[None, :], axis=1), scale, softcap, CAP)
        g = tl.zeros([BV], tl.float32)
        if G is not None:
            g = load_row(G, row * G_n, columns, G_v, inside, 0.0)
        if A is not None:
            g = tl.sum(table * a[None, :], axis=1)
            if CAP_A:
                g = alpha * capped(g, scale, softcap, CAP)
        if X1 is not None:
            g += tl.sum(_table_rows(T1, T1_v, T1_d, columns, depth1, D1, inside) * x1[None, :], axis=1)
        if X2 is not None:
            g += tl.sum(_table_rows(T2, T2_v, T2_d, columns, depth2, D2, inside) * x2[None, :], axis=1)
        g -= origin
        z = tl.where(inside, z, float("-inf"))
        x = z
        if SOFT is not None:
            x = z + load_row(SOFT, row * SOFT_n, columns, SOFT_v, inside, 0.0)
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
            y = z + load_row(HARD, row * HARD_n, columns, HARD_v, inside, 0.0)
            y = tl.where(y == y, y, float("inf"))  # NaN is as bad as +inf, and a maximum drops it
        high = tl.max(y, axis=0)
        lowest = tl.min(tl.where(y == high, columns, 2147483647), axis=0)
        token = tl.where(high > best, lowest, token)
        best = tl.maximum(best, high)
    splits = tl.num_programs(1)
    store_state(STATE, TOKENS, split, splits, row, rows, None, max, sum_exp, 0.0, sum_exp_grad, best, token)
    at = SUMS + ((split.to(tl.int64) * rows + row) * 2) * D + depth
    tl.store(at, weighted, mask=depth < D)
    tl.store(at + D, mean, mask=depth < D)


def fits(rows: int, depths: list[int]) -> bool:
    """Whether the pass takes these rows: each row is multiplied by itself, and a table row must fit in registers."""
    return rows <= 4 and all(triton.next_power_of_2(depth) <= _DEPTH for depth in depths)


class OneRowPass:
    """The pass over the head for few rows of latents (N, d), and its buffers.

    Attributes:
        state: partial states of the parts.
        sums: (parts, N, 2, d), A and B of each part, relative to the part's maximum.
    """

    def __init__(self, h: Tensor, head: Head, gradient: Gradient, tokens: Tensor) -> None:
        rows, weight = len(h), head.weight
        origin = at_tokens(gradient, head, tokens)
        depths = [h.shape[1], *(table.shape[1] for _, table in gradient.terms)]
        padded = [max(16, triton.next_power_of_2(depth)) for depth in depths]
        size = weight.element_size()
        # 4 rows of 4,096 are what the registers take once upcast; 16 would spill.
        block = max(1, min(64, 16384 // padded[0], _TILE_BYTES // (size * sum(padded))))
        block = 2 ** (block.bit_length() - 1)
        stages = min(4, 1 + _FLIGHT_BYTES // (block * size * sum(padded)))
        length, parts = split(weight.shape[0], block, rows, h.device, waves=1)
        self.state = new_state(parts, rows, h.device)
        self.sums = torch.empty(parts, rows, 2, depths[0], dtype=torch.float32, device=h.device)
        self.grid = (rows, parts)
        (x1, t1), (x2, t2) = (*gradient.terms, (None, None), (None, None))[:2]
        self.arguments: dict[str, Any] = {
            "H": h, **strides("H", h, "nd"), "W": weight, **strides("W", weight, "vd"), "D": depths[0],
            "A": gradient.a, "X1": x1, "T1": t1, **strides("T1", t1, "vd"), "D1": 0 if t1 is None else t1.shape[1],
            "X2": x2, "T2": t2, **strides("T2", t2, "vd"), "D2": 0 if t2 is None else t2.shape[1],
            "G": gradient.dense, **strides("G", gradient.dense, "nv"), "ORIGIN": origin,
            "scale": float(head.scale), "softcap": float(head.softcap), "alpha": float(gradient.alpha),
            "STATE": self.state[0], "TOKENS": self.state[1], "SUMS": self.sums, "rows": rows,
            "V": weight.shape[0], "size": length, "CAP": head.softcap != 0, "CAP_A": gradient.capped,
            **dict(zip(("BV", "BD", "BD1", "BD2"), (block, *padded, 1, 1), strict=False)),
            "STAGES": 1 if INTERPRET else stages, "num_warps": 16,
        }  # fmt: skip

    def run(self, inv_tau: float, soft: Tensor | None, hard: Tensor | None, held: Tensor) -> None:
        """Fills ``state`` and ``sums`` of the rows that are not ``held``."""
        run(
            _one_row_kernel, self.grid, self.sums.device, **self.arguments,
            SOFT=soft, **strides("SOFT", soft, "nv"), HARD=hard, **strides("HARD", hard, "nv"), HELD=held,
            inv_tau=inv_tau,
        )  # fmt: skip
