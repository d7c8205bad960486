# mypy: allow-untyped-defs, allow-incomplete-defs
"""Statistics of rows: one pass over logits in memory, or over logits that are computed by tiles and never written.

Logits in memory are read once: a tile of TILE x LANES values a time, TILE of them in each lane. A lane keeps its own
running state, so the loop has no exchange between threads and one extra exponential per TILE values. The argmax costs
one comparison per lane and tile: the winning tile is remembered, and searched once at the end.

From hidden states, the vocabulary is split over the grid's second axis, rows over the first, so that all row blocks
meet the same part of W while it lies in the cache. Each program keeps BN states. Reads: W once per row block (from
memory once in all, as long as the row blocks of a part run together).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import INTERPRET, architecture, check, run, split, strides
from nabla_fast.ops.triton._matmul import (
    Scratch,
    capped,
    logits_in_blocks,
    products,
)
from nabla_fast.ops.triton._softmax import (
    Row,
    combine,
    joined,
    load_row,
    new_state,
    rescale,
    shift,
    store_state,
)
from nabla_fast.ops.types import (
    Head,
    RelaxedStats,
)


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
    max,
    sum_exp,
    sum_exp_logit,
    sum_exp_grad,
    best,
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
        gradient = _load(G, row * G_n, columns, G_v, V, 0.0, MASKED) - origin
        sum_exp_grad += tl.sum(tl.where(e > 0, e * gradient, 0.0), axis=0)
    high = top
    if HARD is not None:
        y = z + _load(HARD, row * HARD_n, columns, HARD_v, V, 0.0, MASKED)
        high = tl.max(tl.where(y == y, y, float("inf")), axis=0)  # NaN is as bad as +inf, and a maximum drops it
    elif SOFT is not None:
        high = tl.max(z, axis=0)
    won = tl.where(high > best, first, won)
    return new_max, sum_exp, sum_exp_logit, sum_exp_grad, tl.maximum(best, high), won


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
    max = tl.full([LANES], float("-inf"), tl.float32)
    sum_exp = tl.zeros([LANES], tl.float32)
    sum_exp_logit = tl.zeros([LANES], tl.float32)
    sum_exp_grad = tl.zeros([LANES], tl.float32)
    best = tl.full([LANES], float("-inf"), tl.float32)
    won = tl.zeros([LANES], tl.int32)
    origin = 0.0
    if G is not None:
        origin = tl.load(ORIGIN + row)
    start = split * size
    end = tl.minimum(start + size, V)
    whole = start + (end - start) // (TILE * LANES) * (TILE * LANES)
    for first in range(start, whole, TILE * LANES):
        max, sum_exp, sum_exp_logit, sum_exp_grad, best, won = _tile(
            Z, Z_n, Z_v, SOFT, SOFT_n, SOFT_v, HARD, HARD_n, HARD_v, G, G_n, G_v, origin, row, first, within, V,
            inv_tau, max, sum_exp, sum_exp_logit, sum_exp_grad, best, won, ENTROPY, False,
        )  # fmt: skip
    if whole < end:
        max, sum_exp, sum_exp_logit, sum_exp_grad, best, won = _tile(
            Z, Z_n, Z_v, SOFT, SOFT_n, SOFT_v, HARD, HARD_n, HARD_v, G, G_n, G_v, origin, row, whole, within, V,
            inv_tau, max, sum_exp, sum_exp_logit, sum_exp_grad, best, won, ENTROPY, True,
        )  # fmt: skip

    top = tl.max(max, axis=0)
    sum_exp, sum_exp_logit, sum_exp_grad = rescale(max, sum_exp, sum_exp_logit, sum_exp_grad, shift(top), inv_tau)
    highest = tl.max(best, axis=0)
    # Tiles are ranges of the vocabulary in order, so the lowest index of the maximum lies in the first tile that won.
    columns = tl.min(tl.where(best == highest, won, V), axis=0) + within
    inside = columns < V
    y = load_row(Z, row * Z_n, columns, Z_v, inside, float("-inf"))
    if HARD is not None:
        y += load_row(HARD, row * HARD_n, columns, HARD_v, inside, 0.0)
    token = tl.min(tl.min(tl.where((y == highest) & inside, columns, 2147483647), axis=1), axis=0)
    store_state(
        STATE, TOKENS, split, tl.num_programs(1), row, rows, None,
        top, tl.sum(sum_exp, axis=0), tl.sum(sum_exp_logit, axis=0), tl.sum(sum_exp_grad, axis=0), highest, token,
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


@triton.jit(do_not_specialize=["rows"])
def _linear_state_kernel(
    H,
    H_n,
    H_d,
    W,
    W_v,
    W_d,
    D,
    scale,
    softcap,
    STATE,
    TOKENS,
    rows,
    V,
    size,
    inv_tau,
    CAP: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = row < rows
    clamped = tl.minimum(row, rows - 1)
    max = tl.full([BN], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BN], tl.float32)
    sum_exp_logit = tl.zeros([BN], tl.float32)
    token = tl.zeros([BN], tl.int32)
    start = split * size
    for first in range(start, tl.minimum(start + size, V), BV):
        columns = first + tl.arange(0, BV)
        inside = wanted[:, None] & (columns < V)[None, :]
        entry = tl.minimum(columns, V - 1)
        z = products(H, H_n, H_d, W, W_v, W_d, D, clamped, entry, BN, BV, BD, EVEN, SWAP, UPCAST)
        z = tl.where(inside, capped(z, scale, softcap, CAP), float("-inf"))
        high = tl.max(z, axis=1)
        lowest = tl.min(tl.where(z == high[:, None], tl.arange(0, BV)[None, :], BV), axis=1)
        token = tl.where(high > max, first + lowest, token)
        new_max = tl.maximum(max, high)
        base = shift(new_max)
        sum_exp, sum_exp_logit, _ = rescale(max, sum_exp, sum_exp_logit, sum_exp_logit, base, inv_tau)
        max = new_max
        difference = (z - base[:, None]) * inv_tau
        e = tl.exp(difference)
        sum_exp += tl.sum(e, axis=1)
        sum_exp_logit += tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
    store_state(
        STATE,
        TOKENS,
        split,
        tl.num_programs(1),
        row,
        rows,
        wanted,
        max,
        sum_exp,
        sum_exp_logit,
        sum_exp_logit,
        max,
        token,
    )


def fused(h: Tensor, head: Head) -> bool:
    """Whether the logits of h come from tiles: the matrix unit takes both operands as they are."""
    return h.dtype == head.weight.dtype and h.dtype in (torch.bfloat16, torch.float16)


def linear_state(h: Tensor, head: Head, inv_tau: float) -> tuple[Tensor, Tensor]:
    """Partial states of ``softmax(logits / tau)`` of `fused` hidden states h (N, d)."""
    (rows, depth), weight = h.shape, head.weight
    options = tile_shape(rows, h.device)
    blocks = triton.cdiv(rows, options["BN"])
    size, splits = split(weight.shape[0], options["BV"], blocks, h.device)
    state = new_state(splits, rows, h.device)
    if rows:
        run(
            _linear_state_kernel, (blocks, splits), h.device, H=h, **strides("H", h, "nd"),
            W=weight, **strides("W", weight, "vd"), D=depth, scale=float(head.scale), softcap=float(head.softcap),
            STATE=state[0], TOKENS=state[1], rows=rows, V=weight.shape[0], size=size, inv_tau=inv_tau,
            CAP=head.softcap != 0, EVEN=depth % options["BD"] == 0, UPCAST=INTERPRET, **options,
        )  # fmt: skip
    return state


def tile_shape(rows: int, device: torch.device) -> dict[str, Any]:
    """Tile shape (BN, BV, BD) and launch options that spill nowhere (`tests/ops/test_triton_compile.py`).

    Few rows take a 16-row tile with the operands swapped. Blackwell hands a finished product to the registers at
    once, which is too much for the widest tiles.
    """
    if INTERPRET:
        shape, swap, options = (16, 256, 32), rows <= 8, (4, 1)
    elif rows <= 16:
        shape, swap, options = (16, 128, 64), True, (4, 4)
    elif rows <= 64 or architecture(device) >= 100:
        shape, swap, options = (64, 128, 64), False, (8, 3)
    elif rows <= 128:
        shape, swap, options = (64, 256, 64), False, (8, 3)
    else:
        shape, swap, options = (128, 128, 64), False, (8, 4)
    return dict(zip(("BN", "BV", "BD", "SWAP", "num_warps", "num_stages"), (*shape, swap, *options), strict=True))


def linear_row(
    h: Tensor,
    head: Head,
    inv_tau: float,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> Row:
    """Statistics of the logits of h (N, d): from tiles where no logit need be written, else from blocks."""
    thresholds = (entropy_threshold, confidence_threshold)
    if fused(h, head):
        return combine(linear_state(h, head, inv_tau), inv_tau, *thresholds)
    scratch = Scratch(len(h), head.weight.shape[0], h.device)
    found = [
        combine(row_state(z, inv_tau, entropy=True), inv_tau, *thresholds)
        for _, z in logits_in_blocks(h, head, scratch)
    ]
    return joined(found) if found else combine(new_state(1, 0, h.device), inv_tau)


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """`reference.relaxed_stats`."""
    check(z)
    state = row_state(z, 1.0 / tau, entropy=True)
    return combine(state, 1.0 / tau, entropy_threshold, confidence_threshold).stats


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats`."""
    check(h, head.weight)
    return linear_row(h, head, 1.0 / tau, entropy_threshold, confidence_threshold).stats
