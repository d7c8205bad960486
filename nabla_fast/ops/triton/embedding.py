# mypy: allow-untyped-defs, allow-incomplete-defs
"""Embeddings through the softmax relaxation, and its gradient, by blocks of rows.

* `straight_through_embedding`: the row statistics' pass, then a gather of the hard tokens' embeddings.
* `soft_embedding`: attention over the vocabulary: statistics, weights, product with the table, mixture (`_mixture`).
  Its gradient, where that will be wanted, is made from the recorded softmax: with bfloat16 logits and table in the
  product that makes G, else from G in float32, and in neither case with another pass for statistics.

Work: 2 N V d_k operations, and 2 N V d more from hidden states, whose logits are computed once; twice the former if
the logits or hidden states are float32 and the table is bfloat16 (`weights`).
* `relaxed_backward`: dL/dz of the relaxation, by blocks of rows: likeliest tokens, G, <p, D>, dL/dz.

D is G less its value at the row's likeliest token. Traffic besides the products': z read three times, G written once
and read twice, dz written once; a float32 dz has its G in the same memory.
* `linear_relaxed_backward`: the relaxation's gradient carried on to hidden states, by blocks of rows.

Work in units of 2 N V d: logits, the gradient of every table, the product with W once each; twice that for float32
hidden states beside bfloat16 tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._launch import check, launch, matrix
from nabla_fast.ops.triton._matmul import (
    Bases,
    Scratch,
    half_blocks,
    logits_in_blocks,
    rounded,
    write_terms,
)
from nabla_fast.ops.triton._mixture import with_mean, write_mixture, write_others, write_relaxed
from nabla_fast.ops.triton._row_stats import row_stats
from nabla_fast.ops.triton._softmax import RowOutputs, load_row, outputs, weight_dtypes, write_weights
from nabla_fast.ops.triton.stats import linear_row, linear_stats
from nabla_fast.ops.types import HardEmbeddings, Head, RecordedMixture


@triton.jit
def _gather_kernel(TABLE, TOKEN, OUT, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    token = tl.load(TOKEN + row)
    value = load_row(TABLE, tl.maximum(token, 0), depth, inside, 0.0)
    tl.store(OUT + row * D + depth, tl.where(token < 0, float("nan"), value), mask=inside)


def _gather(table: Tensor, token: Tensor) -> Tensor:
    out = torch.empty(token.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    if out.numel():
        grid = (len(out), triton.cdiv(out.shape[1], 1024))
        launch(_gather_kernel, grid, out.device, (matrix(table), token, out, out.shape[1]), {"BD": 1024})
    return out


def _embeddings(token: Tensor, tables: Sequence[Tensor]) -> HardEmbeddings:
    return HardEmbeddings([_gather(table, token) for table in tables], token)


def straight_through_embedding(z: Tensor, tables: Sequence[Tensor], tau: float = 1.0) -> HardEmbeddings:
    """`reference.straight_through_embedding`; a row without meaning has token -1 and NaN embeddings."""
    check(z, *tables)
    return _embeddings(row_stats(z, 1.0 / tau, outputs(len(z), z.device, "token")).token, tables)


def linear_straight_through_embedding(
    h: Tensor, head: Head, tables: Sequence[Tensor], tau: float = 1.0
) -> HardEmbeddings:
    """`reference.linear_straight_through_embedding`."""
    check(h, head.weight, *tables)
    return _embeddings(linear_row(h, head, 1.0 / tau, ["token"]).token, tables)


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.soft_embedding`."""
    check(z, table)
    return _soft_embedding(z, table, tau, None).mixture


def soft_embedding_recorded(z: Tensor, table: Tensor, tau: float = 1.0) -> RecordedMixture:
    """`reference.soft_embedding_recorded`."""
    check(z, table)
    return _soft_embedding(z, table, tau, z.new_empty(len(z), table.shape[1], dtype=torch.float32))


def _soft_embedding(z: Tensor, table: Tensor, tau: float, offset: Tensor | None) -> RecordedMixture:
    softmax = row_stats(z, 1.0 / tau, outputs(len(z), z.device, "top", "max_prob", "token"))
    mixture = z.new_empty(len(z), table.shape[1], dtype=torch.float32)
    for rows, weights in _weight_blocks(len(z), table, z.dtype):
        _mix(weights, z[rows], table, 1.0 / tau, softmax.rows(rows), mixture[rows], _rows(offset, rows))
    return RecordedMixture(mixture, mixture if offset is None else offset, softmax.top, softmax.max_prob, softmax.token)


def _weight_blocks(count: int, table: Tensor, source: torch.dtype) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    dtypes = weight_dtypes(source, table.dtype)
    if dtypes == (torch.bfloat16,):
        for rows, weights in half_blocks(count, len(table), torch.bfloat16, table.device):
            yield rows, (weights,)
        return
    scratch = Scratch(count, len(table), table.device)
    for rows in scratch.blocks:
        yield rows, scratch.weights(rows.stop - rows.start, dtypes)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _mix(
    weights: tuple[Tensor, ...],
    z: Tensor,
    table: Tensor,
    inv_tau: float,
    softmax: RowOutputs,
    out: Tensor,
    offset: Tensor | None,
    bases: Bases | None = None,
) -> None:
    """The mixture of the rows z (R, V), or of weights relative to ``bases`` in their place, and its offset."""
    sums = write_others(weights, z, inv_tau, softmax, bases)
    times_rows(weights, table, out)
    write_mixture(out, offset, out, table, softmax.token, sums)


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> Tensor:
    """`reference.linear_soft_embedding`."""
    check(h, head.weight, table)
    return _linear_soft_embedding(h, head, table, tau, None).mixture


def linear_soft_embedding_recorded(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> RecordedMixture:
    """`reference.linear_soft_embedding_recorded`."""
    check(h, head.weight, table)
    return _linear_soft_embedding(h, head, table, tau, h.new_empty(len(h), table.shape[1], dtype=torch.float32))


def _linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float, offset: Tensor | None) -> RecordedMixture:
    mixture = h.new_empty(len(h), table.shape[1], dtype=torch.float32)
    softmax = outputs(len(h), h.device, "top", "max_prob", "token")
    recorded = RecordedMixture(mixture, mixture if offset is None else offset, *softmax[:2], softmax.token)
    if _all_bfloat16(h, head.weight, table):
        for rows, half in half_blocks(len(h), len(table), h.dtype, h.device):
            own = softmax.rows(rows)
            bases = linear_stats(h[rows], head, 1.0 / tau, own, weights=half)
            _mix((half,), half, table, 1.0 / tau, own, mixture[rows], _rows(offset, rows), bases)
        return recorded
    scratch = Scratch(len(h), len(table), h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        own = row_stats(z, 1.0 / tau, softmax.rows(rows))
        weights = scratch.weights(len(z), weight_dtypes(h.dtype, table.dtype))
        _mix(weights, z, table, 1.0 / tau, own, mixture[rows], _rows(offset, rows))
    return recorded


def _all_bfloat16(*tensors: Tensor) -> bool:
    """Whether 8 bits of a weight, or of a gradient, are as good as what they are made from."""
    return all(x.dtype == torch.bfloat16 for x in tensors)


def linear_soft_embedding_backward(
    h: Tensor,
    head: Head,
    vector: Tensor,
    table: Tensor,
    offset: Tensor,
    top: Tensor,
    max_prob: Tensor,
    token: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """`reference.linear_soft_embedding_backward`."""
    check(h, head.weight, vector, table)
    out, softmax = torch.empty(h.shape, dtype=torch.float32, device=h.device), RowOutputs(top, max_prob, token=token)
    if _all_bfloat16(h, head.weight, table):
        x = torch.empty(vector.shape, dtype=h.dtype, device=h.device)
        softmax = with_mean(softmax, vector, offset, table, rounded=x)
        for rows, half in half_blocks(len(h), len(table), h.dtype, h.device):
            write_relaxed(half, None, x[rows], table, 1.0 / tau, softmax.rows(rows), h[rows], head)
            times_rows((half,), head.weight, out[rows], alpha=head.scale)
        return out
    scratch = Scratch(len(h), len(table), h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        gradient = write_terms(scratch.take("gradient", len(z)), rounded([vector[rows]], [table], h.dtype), [table])
        row = with_mean(softmax.rows(rows), vector[rows], offset[rows], table, gradient=gradient)
        weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
        write_weights(weights, z, 1.0 / tau, row, gradient=gradient, softcap=head.softcap)
        times_rows(weights, head.weight, out[rows], alpha=head.scale)
    return out


def soft_embedding_backward(
    z: Tensor,
    vector: Tensor,
    table: Tensor,
    offset: Tensor,
    top: Tensor,
    max_prob: Tensor,
    token: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """`reference.soft_embedding_backward`."""
    check(z, vector, table)
    dz, softmax = torch.empty(z.shape, dtype=z.dtype, device=z.device), RowOutputs(top, max_prob, token=token)
    if not len(z):
        return dz
    if _all_bfloat16(z, table):
        x = torch.empty(vector.shape, dtype=z.dtype, device=z.device)
        softmax = with_mean(softmax, vector, offset, table, rounded=x)
        write_relaxed(dz, z, x, table, 1.0 / tau, softmax)
        return dz
    scratch = Scratch(len(z), len(table), z.device)
    for rows in scratch.blocks:
        gradient = write_terms(_gradient_of(dz[rows], scratch), [vector[rows]], [table])
        row = with_mean(softmax.rows(rows), vector[rows], offset[rows], table, gradient=gradient)
        write_weights((dz[rows],), z[rows], 1.0 / tau, row, gradient=gradient)
    return dz


def _gradient_of(dz: Tensor, scratch: Scratch) -> Tensor:
    """Where G of the rows dz (R, V) goes: into dz itself, if that is float32 and rows begin where products like it."""
    if dz.dtype == torch.float32 and dz.shape[1] % 4 == 0:
        return dz
    return scratch.take("gradient", len(dz))


def relaxed_backward(z: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """`reference.relaxed_backward`."""
    check(z, *vectors, *tables)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    scratch = Scratch(len(z), z.shape[1], z.device)
    vectors = rounded(vectors, tables, z.dtype)
    for rows in scratch.blocks:
        gradient = write_terms(_gradient_of(dz[rows], scratch), [vector[rows] for vector in vectors], tables)
        row = _row_of(z[rows], gradient, 1.0 / tau)
        write_weights((dz[rows],), z[rows], 1.0 / tau, row, gradient=gradient)
    return dz


def _row_of(z: Tensor, gradient: Tensor, inv_tau: float) -> RowOutputs:
    """The softmax of rows z (R, V), and <p, D> of their G."""
    token = row_stats(z, inv_tau, outputs(len(z), z.device, "token")).token
    out = outputs(len(z), z.device, "top", "max_prob", "origin", "q")
    return row_stats(z, inv_tau, out, gradient=gradient, at=token)


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
        row = _row_of(z, gradient, 1.0 / tau)
        weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
        write_weights(weights, z, 1.0 / tau, row, gradient=gradient, softcap=head.softcap)
        times_rows(weights, head.weight, out[rows], alpha=head.scale)
    return out
