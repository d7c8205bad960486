# mypy: allow-untyped-defs, allow-incomplete-defs
"""Embeddings through the softmax relaxation, and its gradient, by blocks of rows.

* `straight_through_embedding`: the row statistics' pass, then a gather of the hard tokens' embeddings.
* `soft_embedding`: attention over the vocabulary, by blocks of rows: statistics, weights, product with the table.

Work: 2 N V d_k operations, and 2 N V d more from hidden states, whose logits are computed once; twice the former if
the logits or hidden states are float32 and the table is bfloat16 (`weights`).
* `relaxed_backward`: dL/dz of the relaxation, by blocks of rows: G, statistics with <p, D>, dL/dz.

D is G less its value at the row's likeliest token. Traffic besides the products': z read three times, G written once
and read twice, dz written once.
* `linear_relaxed_backward`: the relaxation's gradient carried on to hidden states, by blocks of rows.

Work in units of 2 N V d: logits, the gradient of every table, the product with W once each; twice that for float32
hidden states beside bfloat16 tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._launch import check, run, strides
from nabla_fast.ops.triton._matmul import (
    Scratch,
    at_argmax,
    logits_in_blocks,
    rounded,
    row_blocks,
    write_terms,
)
from nabla_fast.ops.triton._softmax import (
    combine,
    weight_dtypes,
    write_weights,
)
from nabla_fast.ops.triton.stats import linear_row, row_state
from nabla_fast.ops.types import (
    HardEmbeddings,
    Head,
)


@triton.jit
def _gather_kernel(TABLE, T_v, T_d, TOKEN, OUT, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    token = tl.load(TOKEN + row)
    at = TABLE + tl.maximum(token, 0) * T_v + depth.to(tl.int64) * T_d
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * D + depth, tl.where(token < 0, float("nan"), value), mask=inside)


def _gather(table: Tensor, token: Tensor) -> Tensor:
    out = torch.empty(token.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    if out.numel():
        run(
            _gather_kernel, (out.shape[0], triton.cdiv(out.shape[1], 1024)), out.device,
            TABLE=table, **strides("T", table, "vd"), TOKEN=token, OUT=out, D=out.shape[1], BD=1024, num_warps=4,
        )  # fmt: skip
    return out


def _embeddings(token: Tensor, tables: Sequence[Tensor]) -> HardEmbeddings:
    return HardEmbeddings([_gather(table, token) for table in tables], token)


def straight_through_embedding(z: Tensor, tables: Sequence[Tensor], tau: float = 1.0) -> HardEmbeddings:
    """`reference.straight_through_embedding`; a row without meaning has token -1 and NaN embeddings."""
    check(z, *tables)
    return _embeddings(combine(row_state(z, 1.0 / tau), 1.0 / tau).stats.token, tables)


def linear_straight_through_embedding(
    h: Tensor, head: Head, tables: Sequence[Tensor], tau: float = 1.0
) -> HardEmbeddings:
    """`reference.linear_straight_through_embedding`."""
    check(h, head.weight, *tables)
    return _embeddings(linear_row(h, head, 1.0 / tau).stats.token, tables)


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.soft_embedding`."""
    check(z, table)
    out = z.new_empty(len(z), table.shape[1], dtype=torch.float32)
    scratch = Scratch(len(z), len(table), z.device)
    for rows in row_blocks(len(z), len(table)):
        _mix(z[rows], table, 1.0 / tau, z.dtype, scratch, out[rows])
    return out


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.linear_soft_embedding`."""
    check(h, head.weight, table)
    out = h.new_empty(len(h), table.shape[1], dtype=torch.float32)
    scratch = Scratch(len(h), len(table), h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        _mix(z, table, 1.0 / tau, h.dtype, scratch, out[rows])
    return out


def _mix(z: Tensor, table: Tensor, inv_tau: float, source: torch.dtype, scratch: Scratch, out: Tensor) -> None:
    row = combine(row_state(z, inv_tau), inv_tau)
    weights = scratch.weights(len(z), weight_dtypes(source, table.dtype))
    write_weights(weights, z, inv_tau, "softmax", row.top, row.stats.max_prob)
    times_rows(weights, table, out)


def relaxed_backward(z: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """`reference.relaxed_backward`."""
    check(z, *vectors, *tables)
    dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    count, vocabulary = z.shape
    scratch = Scratch(count, vocabulary, z.device)
    vectors = rounded(vectors, tables, z.dtype)
    for rows in row_blocks(count, vocabulary):
        part = z[rows]
        gradient = write_terms(scratch.take("gradient", len(part)), [vector[rows] for vector in vectors], tables)
        origin = at_argmax(gradient, part)
        row = combine(row_state(part, 1.0 / tau, gradient=gradient, origin=origin), 1.0 / tau)
        write_weights(
            (dz[rows],), part, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, gradient=gradient, origin=origin,
            q=row.q,
        )  # fmt: skip
    return dz


def linear_relaxed_backward(
    h: Tensor, head: Head, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`reference.linear_relaxed_backward`."""
    check(h, head.weight, *vectors, *tables)
    out = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    scratch = Scratch(len(h), head.weight.shape[0], h.device)
    vectors = rounded(vectors, tables, h.dtype)
    for rows, z in logits_in_blocks(h, head, scratch):
        gradient = write_terms(scratch.take("gradient", len(z)), [vector[rows] for vector in vectors], tables)
        origin = at_argmax(gradient, z)
        row = combine(row_state(z, 1.0 / tau, gradient=gradient, origin=origin), 1.0 / tau)
        weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
        write_weights(
            weights, z, 1.0 / tau, "relaxed", row.top, row.stats.max_prob, gradient=gradient,
            origin=origin, q=row.q, softcap=head.softcap,
        )  # fmt: skip
        times_rows(weights, head.weight, out[rows], alpha=head.scale)
    return out
