# mypy: allow-untyped-defs, allow-incomplete-defs
"""`gradient_norm`: G of a block of rows, and the logits for their log-sum-exp; then one read of both.

Work: 2 N V (2 d + d_r) operations, of which what has a float32 factor beside a bfloat16 table counts twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import check, run, split
from nabla_fast.ops.triton._matmul import (
    Scratch,
    logits_in_blocks,
    write_terms,
)
from nabla_fast.ops.triton._softmax import (
    combine,
    load_row,
)
from nabla_fast.ops.triton.stats import row_state
from nabla_fast.ops.types import (
    Tables,
    TokenGradient,
)


@triton.jit(do_not_specialize=["rows"])
def _squares_kernel(Z, Z_n, G, G_n, LSE, OUT, rows, V, size, nll, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * size
    lse = tl.load(LSE + row)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, tl.minimum(start + size, V), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < V
        g = load_row(G, row * G_n, columns, 1, inside, 0.0)
        if nll != 0:
            z = load_row(Z, row * Z_n, columns, 1, inside, 0.0)
            g -= tl.where(inside, nll * (z - lse), 0.0)
        total += g * g
    tl.store(OUT + tl.program_id(1) * rows + row, tl.sum(total, axis=0))


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """`reference.gradient_norm`."""
    head = tables.head
    check(*factors, head.weight, tables.embedding, tables.reward_embedding)
    norm = torch.empty(len(factors.hidden), dtype=torch.float32, device=factors.hidden.device)
    scratch = Scratch(len(norm), head.weight.shape[0], norm.device)
    for rows, z in logits_in_blocks(factors.hidden, head, scratch):
        vectors = (factors.embedding[rows], factors.reward_embedding[rows])
        g = write_terms(scratch.take("gradient", len(z)), vectors, (tables.embedding, tables.reward_embedding))
        lse = combine(row_state(z, 1.0), 1.0).stats.lse
        block = 1024
        size, parts = split(z.shape[1], block, len(z), z.device, waves=4)
        squares = torch.empty(parts, len(z), dtype=torch.float32, device=z.device)
        run(
            _squares_kernel, (len(z), parts), z.device, Z=z, Z_n=z.stride(0), G=g, G_n=g.stride(0), LSE=lse,
            OUT=squares, rows=len(z), V=z.shape[1], size=size, nll=float(tables.nll_coeff), BLOCK=block, num_warps=4,
        )  # fmt: skip
        # A row without meaning has no log-sum-exp, whatever the likelihood's weight is.
        torch.where(lse.isnan(), lse, squares.sum(0).sqrt(), out=norm[rows])
    return norm
