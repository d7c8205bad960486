# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over the vocabulary: sum_v weight(n, v) table_v, as (N, d_k), with no (N, V) tensor on the way.

The vocabulary goes by in chunks. Per chunk one launch writes the weights of all rows into a scratch (N, C), and one
multiplies the scratch with the chunk's rows of the table into running sums. Each logit is computed once, whatever the
hidden size (a program that owned a block of d and recomputed its logits would do it d / BD times); the price is the
scratch, 8 bytes of traffic per logit against 2 d products. With few rows C is small, so that the chunk of the table
that the first launch read from memory is still in the L2 cache for the second. Where few programs would run, the
chunk is split between several, each with sums of its own; they are added at the end in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import INTERPRET, dot_mode, run, split, strides
from nabla_fast.ops.triton.sources import Logits
from nabla_fast.ops.triton.tiles import dot


@triton.jit
def _sum_kernel(
    Z,
    Z_n,
    Z_v,
    TOP,
    INVERSE,
    TABLE,
    T_v,
    T_d,
    HELD,
    SUMS,
    rows,
    D,
    first,
    length,
    size,
    inv_tau,
    RESUME: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    MODE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = row < rows
    if HELD is not None:
        wanted = wanted & (tl.load(HELD + row, mask=wanted, other=1) == 0)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    part = tl.program_id(2).to(tl.int64)
    inside = wanted[:, None] & (depth < D)[None, :]
    at = SUMS + (part * rows + row)[:, None] * D + depth[None, :]
    if RESUME:  # noqa: SIM108
        acc = tl.load(at, mask=inside, other=0.0)
    else:
        acc = tl.zeros([BN, BD], tl.float32)
    start = tl.program_id(2) * size
    for begin in range(start, tl.minimum(start + size, length), BV):
        columns = begin + tl.arange(0, BV)
        present = (columns < length)[None, :] & wanted[:, None]
        weight_at = Z + (row * Z_n)[:, None] + (columns.to(tl.int64) * Z_v)[None, :]
        if SOFTMAX:
            z = tl.load(weight_at, mask=present, other=float("-inf")).to(tl.float32)
            top = tl.load(TOP + row, mask=wanted, other=0.0)
            inverse = tl.load(INVERSE + row, mask=wanted, other=0.0)
            weight = tl.exp((z - top[:, None]) * inv_tau) * inverse[:, None]
        else:
            weight = tl.load(weight_at, mask=present, other=0.0)
        table_at = TABLE + ((first + columns).to(tl.int64) * T_v)[None, :] + (depth.to(tl.int64) * T_d)[:, None]
        table = tl.load(table_at, mask=(columns < length)[None, :] & (depth < D)[:, None], other=0.0)
        acc = dot(weight, table, acc, MODE, False)
    tl.store(at, acc, mask=inside)


@triton.jit
def _finish_kernel(SUMS, OUT, rows, D, parts, factor, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    acc = tl.zeros([BD], tl.float32)
    for part in range(parts):
        acc += tl.load(SUMS + (part * rows + row) * D + depth, mask=inside, other=0.0)
    tl.store(OUT + row * D + depth, acc * factor, mask=inside)


def sum_shape(rows: int, mode: str) -> dict[str, Any]:
    """Tile shape (BN, BV, BD) and launch options of the sum."""
    if INTERPRET:
        shape, options = (16, 256, 64), (4, 1)
    elif mode == "tf32x3":
        shape, options = ((16, 32, 64), (4, 3)) if rows <= 16 else ((64, 32, 64), (4, 3))
    elif rows <= 16:
        shape, options = (16, 64, 64), (4, 4)
    else:
        shape, options = (64, 32, 128), (8, 3)
    return dict(zip(("BN", "BV", "BD", "num_warps", "num_stages"), (*shape, *options), strict=True))


def chunk_length(rows: int) -> int:
    """Entries per chunk: 4,096 for few rows (a chunk of a table stays in the L2 cache), a 64 MiB scratch for many."""
    return 4096 if rows <= 64 else max(1024, min(16384, 2**24 // rows // 256 * 256))


class VocabularySum:
    """Running sums (parts, N, d_k) of weighted table rows.

    Args:
        rows: N.
        table: (V, d_k).
        length: entries of the vocabulary per chunk; V for one chunk.
    """

    def __init__(self, rows: int, table: Tensor, length: int) -> None:
        self.rows, self.table = rows, table
        self.mode = dot_mode(torch.empty(0), table)
        self.options = sum_shape(rows, self.mode)
        self.blocks = (triton.cdiv(rows, self.options["BN"]), triton.cdiv(table.shape[1], self.options["BD"]))
        self.size, parts = split(length, self.options["BV"], self.blocks[0] * self.blocks[1], table.device)
        self.sums = torch.empty(parts, rows, table.shape[1], dtype=torch.float32, device=table.device)

    def add(
        self,
        weights: Tensor,
        first: int,
        length: int,
        *,
        held: Tensor | None = None,
        softmax: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        """Adds the entries first ... first + length; ``softmax`` (top, inverse, 1 / tau): the weights are logits."""
        top, inverse, inv_tau = softmax or (None, None, 1.0)
        run(
            _sum_kernel, (*self.blocks, self.sums.shape[0]), weights.device,
            Z=weights, **strides("Z", weights, "nv"), TOP=top, INVERSE=inverse,
            TABLE=self.table, **strides("T", self.table, "vd"), HELD=held, SUMS=self.sums, rows=self.rows,
            D=self.table.shape[1], first=first, length=length, size=self.size, inv_tau=inv_tau,
            RESUME=first > 0, SOFTMAX=softmax is not None, MODE=self.mode, **self.options,
        )  # fmt: skip

    def finish(self, factor: float = 1.0) -> Tensor:
        """The sums (N, d_k), times ``factor``."""
        out = torch.empty(self.rows, self.table.shape[1], dtype=torch.float32, device=self.table.device)
        run(
            _finish_kernel, (self.rows, triton.cdiv(out.shape[1], 512)), out.device, SUMS=self.sums, OUT=out,
            rows=self.rows, D=out.shape[1], parts=self.sums.shape[0], factor=float(factor), BD=512, num_warps=4,
        )  # fmt: skip
        return out


def sum_in_chunks(
    logits: Logits, table: Tensor, write: Callable[[Tensor, int], None], held: Tensor | None = None
) -> VocabularySum:
    """The sum over all chunks: ``write(scratch, first)`` fills the weights (N, C) of the one that begins there."""
    rows, vocabulary = logits.rows, logits.vocabulary
    length = min(chunk_length(rows), vocabulary)
    total = VocabularySum(rows, table, length)
    scratch = torch.empty(rows, length, dtype=torch.float32, device=logits.device)
    for first in range(0, vocabulary, length):
        chunk = scratch[:, : min(length, vocabulary - first)]
        write(chunk, first)
        total.add(chunk, first, chunk.shape[1], held=held)
    return total
