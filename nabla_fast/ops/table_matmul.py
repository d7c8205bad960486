"""Products with the vocabulary's tables by torch's matrix library, in float32 whatever the tables are stored in.

On a GPU a bfloat16 table is never upcast, which would take three times its memory: float32 factors are taken as a sum
of two bfloat16 ones, which keeps 16 bits of their 24, and the library adds up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Up to so many rows the table's reading decides, so both halves of the rows go into one product.
_READ_BOUND = 64
# Entries of a table that are upcast at once.
_UPCAST = 2**25


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 ``high`` and ``low`` whose sum is float32 ``x`` to 2^-17 of it."""
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def times_table(x: Tensor, table: Tensor, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> Tensor:
    """Writes ``alpha * x @ table.T`` into ``out`` (N, V) float32, or adds it; x (N, d), table (V, d) of any dtypes."""
    if x.is_cuda and table.dtype in (torch.bfloat16, torch.float16):
        if x.dtype == table.dtype:
            return _multiply(out, x, table.T, alpha, add)
        if table.dtype == torch.bfloat16:
            parts = halves(x.float())
            if len(x) > _READ_BOUND:
                _multiply(out, parts[0], table.T, alpha, add)
                return _multiply(out, parts[1], table.T, alpha, True)
            both = torch.mm(torch.cat(parts), table.T, out_dtype=torch.float32)
            total = both[: len(x)].add_(both[len(x) :])
            return out.add_(total, alpha=alpha) if add else torch.mul(total, alpha, out=out)
    x = x.float()
    for first, part in _upcast(table):
        target = out[:, first : first + len(part)]
        torch.addmm(target, x, part.T, beta=float(add), alpha=alpha, out=target)
    return out


def times_rows(weights: Sequence[Tensor], table: Tensor, out: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Writes ``alpha * sum(weights) @ table`` into ``out`` (N, d) float32.

    Args:
        weights: one (N, V) float32 tensor, or one or two of the table's dtype, which add up to the weights.
        table: (V, d).
    """
    if weights[0].is_cuda and weights[0].dtype == table.dtype != torch.float32:
        for i, part in enumerate(weights):
            _multiply(out, part, table, alpha, i > 0)
        return out
    for first, part in _upcast(table):
        for i, weight in enumerate(weights):
            chunk = weight[:, first : first + len(part)].float()
            torch.addmm(out, chunk, part, beta=float(first > 0 or i > 0), alpha=alpha, out=out)
    return out


def _multiply(out: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool) -> Tensor:
    """``out`` = alpha a @ b, plus what it was: half precision in, float32 out."""
    torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=float(add), alpha=alpha, out=out)
    return out


def _upcast(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``table`` in float32, in pieces where that takes a copy: (first entry, rows)."""
    count = len(table) if table.dtype == torch.float32 else max(1, _UPCAST // max(1, table.shape[1]))
    for first in range(0, len(table), count):
        yield first, table[first : first + count].float()
