# mypy: allow-untyped-defs, allow-incomplete-defs
"""`gradient_norm`: in one launch by tiles of three products, or from G and logits of blocks of rows, read once.

With half-precision factors no (N, V) tensor is written: a tile's logits and its G come from products in registers. Else
the matrix library makes both for so many rows as fit into a scratch.

The norm is that of w + c log sum e^(z - max z) with c = nll_coeff and w = G - c (z - max z), while max z and the sum
are still being found. So of w the mean is kept, which a new maximum moves, and the sum of squares about it, which it
leaves alone: nothing cancels when both are put together.

Work: 2 N V (2 d + d_r) operations, of which what has a float32 factor beside a bfloat16 table counts twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import check, counters, last_to_arrive, launch, matrix, split
from nabla_fast.ops.triton._matmul import (
    Scratch,
    capped,
    fused,
    logits_in_blocks,
    products,
    tile_shape,
    write_terms,
)
from nabla_fast.ops.triton._row_scan import load_tile
from nabla_fast.ops.triton._softmax import put_fields, shift
from nabla_fast.ops.types import Tables, TokenGradient

# Of a part of a row: max, sum of e^(z - max), mean of w, sum of squares about it.
FIELDS = tl.constexpr(4)


@triton.jit
def _moved(max, new_max, total, mean, nll):
    """The sum and the mean relative to a new maximum."""
    base, before = shift(new_max), shift(max)
    return total * tl.exp(max - base), mean + nll * (base - before)


@triton.jit
def _joined(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and squares about it of two sets of numbers."""
    both = tl.maximum(count + other_count, 1)
    difference = other_mean - mean
    share = other_count.to(tl.float32) / both
    return mean + difference * share, squares + other_squares + difference * difference * share * count


@triton.jit
def _with_tile(state, z, g, inside, count, seen, nll, AXIS: tl.constexpr):
    """The state after ``count`` entries, with a tile of ``seen`` more along an axis."""
    max, total, mean, squares = state
    new_max = tl.maximum(max, tl.max(z, axis=AXIS))
    total, mean = _moved(max, new_max, total, mean, nll)
    base = tl.expand_dims(shift(new_max), AXIS)
    e = tl.where(inside, tl.exp(z - base), 0.0)
    w = tl.where(inside, g - tl.where(nll == 0, 0.0, nll * (z - base)), 0.0)
    own_mean = tl.sum(w, axis=AXIS) / tl.maximum(seen, 1)
    about = tl.where(inside, w - tl.expand_dims(own_mean, AXIS), 0.0)
    mean, squares = _joined(count, mean, squares, seen, own_mean, tl.sum(about * about, axis=AXIS))
    return new_max, total + tl.sum(e, axis=AXIS), mean, squares


@triton.jit
def _take_parts(at, step, inside):
    """The states of parts, past the cache of this multiprocessor, which others do not write to."""
    max = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(at + step, mask=inside, other=0.0, cache_modifier=".cg")
    mean = tl.load(at + 2 * step, mask=inside, other=0.0, cache_modifier=".cg")
    squares = tl.load(at + 3 * step, mask=inside, other=0.0, cache_modifier=".cg")
    return max, total, mean, squares


@triton.jit
def _over(state, count, nll):
    """The states of lanes or parts, the first axis, as one."""
    max, total, mean, squares = state
    top = tl.max(max, axis=0)
    total, mean = _moved(max, tl.expand_dims(top, 0), total, mean, nll)
    weight = count.to(tl.float32)
    whole = tl.sum(tl.where(count > 0, weight * mean, 0.0), axis=0) / tl.sum(weight, axis=0)
    away = tl.where(count > 0, mean - tl.expand_dims(whole, 0), 0.0)
    return top, tl.sum(total, axis=0), whole, tl.sum(squares + weight * away * away, axis=0)


@triton.jit
def _norm(state, count, nll):
    top, total, mean, squares = state
    log_total = tl.log(total)
    away = mean + nll * log_total
    # A row without meaning has no log-sum-exp, whatever the likelihood's weight is.
    good = (total == total) & (tl.abs(top) < float("inf"))
    return tl.where(good, tl.sqrt(squares + count * away * away), float("nan"))


@triton.jit
def _scan_norm_kernel(
    Z,
    G,
    OUT,
    PARTS,
    COUNTER,
    V,
    size,
    nll,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    within = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zeros = tl.zeros([LANES], tl.float32)
    state = (tl.full([LANES], float("-inf"), tl.float32), zeros, zeros, zeros)
    count = tl.zeros([LANES], tl.int32)
    start = split * size
    end = tl.minimum(start + size, V)
    for first in range(start, end, TILE * LANES):
        columns = first + within
        inside = columns < end
        z = load_tile(Z, row, columns, end, float("-inf"), True)
        g = load_tile(G, row, columns, end, 0.0, True)
        seen = tl.sum(inside.to(tl.int32), axis=0)
        state = _with_tile(state, z, g, inside, count, seen, nll, 0)
        count += seen
    state = _over(state, count, nll)
    if SPLITS > 1:
        put_fields(PARTS + (row * splits + split) * FIELDS, 1, None, state)
        if not last_to_arrive(COUNTER + row, splits):
            return
        part = tl.arange(0, SPLITS)
        parts = _take_parts(PARTS + (row * splits + part) * FIELDS, 1, part < splits)
        state = _over(parts, tl.maximum(tl.minimum(V - part * size, size), 0), nll)
    tl.store(OUT + row, _norm(state, V, nll))


@triton.jit(do_not_specialize=["rows"])
def _tile_norm_kernel(
    H,
    W,
    D,
    A,
    E,
    D_E,
    B,
    R,
    D_R,
    OUT,
    PARTS,
    COUNTER,
    rows,
    V,
    size,
    scale,
    softcap,
    nll,
    CAP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_E: tl.constexpr,
    EVEN_R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = row < rows
    clamped = tl.minimum(row, rows - 1)
    zeros = tl.zeros([BN], tl.float32)
    nothing = (tl.full([BN], float("-inf"), tl.float32), zeros, zeros, zeros)
    state = nothing
    start = split * size
    end = tl.minimum(start + size, V)
    for first in range(start, end, BV):
        columns = first + tl.arange(0, BV)
        inside = wanted[:, None] & (columns < end)[None, :]
        entry = tl.minimum(columns, V - 1)
        g = products(A, E, D_E, clamped, entry, BN, BV, BD, EVEN_E, SWAP, UPCAST)
        g += products(B, R, D_R, clamped, entry, BN, BV, BD, EVEN_R, SWAP, UPCAST)
        z = products(H, W, D, clamped, entry, BN, BV, BD, EVEN, SWAP, UPCAST)
        z = tl.where(inside, capped(z, scale, softcap, CAP), float("-inf"))
        state = _with_tile(state, z, g, inside, first - start, tl.minimum(end - first, BV), nll, 1)
    put_fields(PARTS + split * FIELDS * rows + row, rows, wanted, state)
    if not last_to_arrive(COUNTER + tl.program_id(0), splits):
        return
    top, total, mean, squares = nothing
    for begin in range(0, splits, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        there = (index < splits)[:, None] & wanted[None, :]
        parts = _take_parts(PARTS + (index * FIELDS * rows)[:, None] + row[None, :], rows, there)
        counts = tl.maximum(tl.minimum(V - index * size, size), 0)[:, None]
        parts_top, parts_total, parts_mean, parts_squares = _over(parts, counts, nll)
        merged = tl.maximum(top, parts_top)
        total, mean = _moved(top, merged, total, mean, nll)
        parts_total, parts_mean = _moved(parts_top, merged, parts_total, parts_mean, nll)
        total += parts_total
        parts_count = tl.minimum(V - begin * size, CHUNK * size)
        mean, squares = _joined(begin * size, mean, squares, parts_count, parts_mean, parts_squares)
        top = merged
    tl.store(OUT + row, _norm((top, total, mean, squares), V, nll), mask=wanted)


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """`reference.gradient_norm`."""
    head = tables.head
    check(*factors, head.weight, tables.embedding, tables.reward_embedding)
    norm = torch.empty(len(factors.hidden), dtype=torch.float32, device=factors.hidden.device)
    if not len(norm):
        return norm
    pairs = zip(factors, (head.weight, tables.embedding, tables.reward_embedding), strict=True)
    if all(fused(factor, table) and factor.dtype == head.weight.dtype for factor, table in pairs):
        _by_tiles(norm, factors, tables)
        return norm
    scratch = Scratch(len(norm), head.weight.shape[0], norm.device)
    for rows, z in logits_in_blocks(factors.hidden, head, scratch):
        vectors = (factors.embedding[rows], factors.reward_embedding[rows])
        g = write_terms(scratch.take("gradient", len(z)), vectors, (tables.embedding, tables.reward_embedding))
        _scan(norm[rows], z, g, tables.nll_coeff)
    return norm


def _scan(norm: Tensor, z: Tensor, g: Tensor, nll: float) -> None:
    (rows, vocabulary), tile, lanes = z.shape, 4, 512
    size, splits = split(vocabulary, tile * lanes, rows, z.device, waves=4)
    parts = torch.empty(rows * splits * FIELDS.value, dtype=torch.float32, device=z.device)
    launch(
        _scan_norm_kernel, (rows, splits), z.device,
        (matrix(z), matrix(g), norm, parts, counters(rows, z.device), vocabulary, size, float(nll)),
        {"SPLITS": triton.next_power_of_2(splits), "TILE": tile, "LANES": lanes},
    )  # fmt: skip


def _by_tiles(norm: Tensor, factors: TokenGradient, tables: Tables) -> None:
    head, rows = tables.head, len(norm)
    vocabulary, tiles = len(head.weight), tile_shape(rows, norm.device, full=True)
    blocks = triton.cdiv(rows, tiles.BN)
    size, splits = split(vocabulary, tiles.BV, blocks, norm.device)
    parts = torch.empty(splits, FIELDS.value, rows, dtype=torch.float32, device=norm.device)
    pairs = [*zip(factors, (head.weight, tables.embedding, tables.reward_embedding), strict=True)]
    _, even_e, even_r = (factor.shape[1] % tiles.BD == 0 for factor in factors)
    launch(
        _tile_norm_kernel, (blocks, splits), norm.device,
        (
            *(x for factor, table in pairs for x in (matrix(factor), matrix(table), factor.shape[1])), norm, parts,
            counters(blocks, norm.device), rows, vocabulary, size, float(head.scale), float(head.softcap),
            float(tables.nll_coeff),
        ),
        {
            "CAP": head.softcap != 0, "CHUNK": 2048 // tiles.BN, "EVEN_E": even_e, "EVEN_R": even_r,
            **tiles.constants(factors.hidden.shape[1]),
        },
        **tiles.options,
    )  # fmt: skip
