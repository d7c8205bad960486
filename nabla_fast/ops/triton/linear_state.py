# mypy: allow-untyped-defs, allow-incomplete-defs
"""The online softmax state of rows whose logits are computed tile by tile and never written.

The vocabulary is split over the grid's second axis, rows over the first, so that all row blocks meet the same part of
W while it lies in the cache. Each program keeps BN states. Reads: W once per row block (from memory once in all, as
long as the row blocks of a part run together).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import INTERPRET, architecture, run, split, strides
from nabla_fast.ops.triton.online import new_state, rescale, shift, store_state
from nabla_fast.ops.triton.tiles import capped, products
from nabla_fast.ops.types import Head


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
    m = tl.full([BN], float("-inf"), tl.float32)
    s = tl.zeros([BN], tl.float32)
    t = tl.zeros([BN], tl.float32)
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
        token = tl.where(high > m, first + lowest, token)
        m_new = tl.maximum(m, high)
        base = shift(m_new)
        s, t, _ = rescale(m, s, t, t, base, inv_tau)
        m = m_new
        difference = (z - base[:, None]) * inv_tau
        e = tl.exp(difference)
        s += tl.sum(e, axis=1)
        t += tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
    store_state(STATE, TOKENS, split, tl.num_programs(1), row, rows, wanted, m, s, t, t, m, token)


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
    """Tile shape (BN, BV, BD) and launch options that spill nowhere (`tests/test_triton_compile.py` holds them to it).

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
