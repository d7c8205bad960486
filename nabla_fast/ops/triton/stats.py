# mypy: allow-untyped-defs, allow-incomplete-defs
"""Statistics of rows: one pass over logits in memory, or over logits that are computed by tiles and never written.

Logits in memory are read once (`_row_scan`), in one launch: where several programs share a row, the last of them to
finish merges what all have found.

From hidden states, the vocabulary is split over the grid's second axis, rows over the first, so that all row blocks
meet the same part of W while it lies in the cache. Each program keeps BN states. Reads: W once per row block (from
memory once in all, as long as the row blocks of a part run together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import check, counters, last_to_arrive, launch, matrix, split
from nabla_fast.ops.triton._matmul import (
    Bases,
    Scratch,
    cap_slope,
    capped,
    fused,
    logits_in_blocks,
    products,
    tile_shape,
)
from nabla_fast.ops.triton._row_scan import scan_row
from nabla_fast.ops.triton._row_stats import NO_THRESHOLDS, row_stats, tile_of_row, write_stats
from nabla_fast.ops.triton._softmax import (
    FIELDS,
    RowOutputs,
    outputs,
    put_fields,
    rescale,
    shift,
    take_state,
)
from nabla_fast.ops.types import Head, RelaxedStats

STATS = ("max_prob", "lse", "entropy", "token", "mask")


@triton.jit(do_not_specialize=["rows"])
def _row_state_kernel(
    Z,
    SOFT,
    HARD,
    G,
    ORIGIN,
    HELD,
    STATE,
    rows,
    V,
    size,
    inv_tau,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if HELD is not None:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if tl.load(HELD + row) != 0:
            return
    origin = 0.0
    if G is not None:
        origin = tl.load(ORIGIN + row)
    start = split * size
    state = scan_row(
        Z, SOFT, HARD, G, origin, -1, row, start, tl.minimum(start + size, V), V, inv_tau, False, False, TILE, LANES
    )
    top, total, t, q, token, highest = state
    at = STATE + split * rows + row
    token = token.to(tl.float32, bitcast=True)
    put_fields(at, tl.num_programs(1) * rows, None, (top, total, t, q, token, highest))


def row_state(
    z: Tensor,
    inv_tau: float,
    *,
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    gradient: Tensor | None = None,
    origin: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Partial states (fields, splits, N) of ``softmax((z + soft) / tau)``, hard tokens of z + hard, sums with G.

    The dense gradient G is taken relative to ``origin`` (N,), its value at the row's likeliest token: only differences
    matter, and G - <p, G> would cancel where that token is nearly certain. Of rows with ``held`` set nothing is
    written. One program per row where rows are many, else several per row.
    """
    rows, vocabulary = z.shape
    tile, lanes = tile_of_row(z, plain=soft is None and hard is None and gradient is None)
    size, splits = split(vocabulary, tile * lanes, rows, z.device, waves=4)
    state = torch.empty(FIELDS.value, splits, rows, dtype=torch.float32, device=z.device)
    if rows:
        launch(
            _row_state_kernel, (rows, splits), z.device,
            (*map(matrix, (z, soft, hard, gradient)), origin, held, state, rows, vocabulary, size, inv_tau),
            {"TILE": tile, "LANES": lanes},
        )  # fmt: skip
    return state


@triton.jit(do_not_specialize=["rows"])
def _linear_stats_kernel(
    H,
    W,
    D,
    scale,
    softcap,
    TARGET,
    OUT,
    WEIGHTS,
    BASES,
    PARTS,
    COUNTER,
    rows,
    V,
    size,
    inv_tau,
    entropy_threshold,
    confidence_threshold,
    CAP: tl.constexpr,
    CHUNK: tl.constexpr,
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
    max = tl.full([BN], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BN], tl.float32)
    sum_exp_logit = tl.zeros([BN], tl.float32)
    others = tl.zeros([BN], tl.float32)
    value = tl.zeros([BN], tl.float32)
    token = tl.zeros([BN], tl.int32)
    target = tl.full([BN], -1, tl.int64)
    if TARGET is not None:
        target = tl.load(TARGET + clamped)
    start = split * size
    for first in range(start, tl.minimum(start + size, V), BV):
        columns = first + tl.arange(0, BV)
        inside = wanted[:, None] & (columns < V)[None, :]
        entry = tl.minimum(columns, V - 1)
        z = products(H, W, D, clamped, entry, BN, BV, BD, EVEN, SWAP, UPCAST)
        z = tl.where(inside, capped(z, scale, softcap, CAP), float("-inf"))
        if TARGET is not None:
            value += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
        high = tl.max(z, axis=1)
        if OUT.token is not None:
            lowest = tl.min(tl.where(z == high[:, None], tl.arange(0, BV)[None, :], BV), axis=1)
            token = tl.where(high > max, first + lowest, token)
        new_max = tl.maximum(max, high)
        base = shift(new_max)
        sum_exp, sum_exp_logit, others = rescale(max, sum_exp, sum_exp_logit, others, base, inv_tau)
        max = new_max
        difference = (z - base[:, None]) * inv_tau
        e = tl.exp(difference)
        sum_exp += tl.sum(e, axis=1)
        if OUT.entropy is not None:
            sum_exp_logit += tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
        if OUT.q is not None:
            others += tl.sum(tl.where(columns[None, :] == target[:, None], 0.0, e), axis=1)
        if WEIGHTS is not None:
            if CAP and TARGET is not None:
                # A -inf logit has weight 0, and a slope that is not a number.
                e = tl.where(e == 0, 0.0, e * cap_slope(z, softcap))
            place = WEIGHTS.data + (row * WEIGHTS.row_stride)[:, None] + columns[None, :]
            tl.store(place, e.to(WEIGHTS.data.dtype.element_ty), mask=inside)
            tl.store(BASES + first // BV * rows + row, base, mask=wanted)
    # In the place of best, the target's logit.
    token = token.to(tl.float32, bitcast=True)
    put_fields(
        PARTS + split * FIELDS * rows + row, rows, wanted, (max, sum_exp, sum_exp_logit, others, token, value)
    )  # fmt: skip
    if not last_to_arrive(COUNTER + tl.program_id(0), splits):
        return
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    t = tl.zeros([BN], tl.float32)
    q = tl.zeros([BN], tl.float32)
    value = tl.zeros([BN], tl.float32)
    token = tl.zeros([BN], tl.int32)
    for begin in range(0, splits, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        there = (index < splits)[:, None] & wanted[None, :]
        place = PARTS + (index * FIELDS * rows)[:, None] + row[None, :]
        parts_max, parts_total, parts_t, parts_q, parts_token = take_state(place, rows, there)
        value += tl.sum(tl.load(place + 5 * rows, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
        parts_top = tl.max(parts_max, axis=0)
        parts_lowest = tl.min(tl.where(there & (parts_max == parts_top[None, :]), parts_token, 2147483647), axis=0)
        token = tl.where(parts_top > top, parts_lowest, token)
        merged = tl.maximum(top, parts_top)
        merged_base = shift(merged)
        total, t, q = rescale(top, total, t, q, merged_base, inv_tau)
        parts_total, parts_t, parts_q = rescale(parts_max, parts_total, parts_t, parts_q, merged_base[None, :], inv_tau)
        total += tl.sum(parts_total, axis=0)
        t += tl.sum(parts_t, axis=0)
        q += tl.sum(parts_q, axis=0)
        top = merged
    good = (total == total) & (tl.abs(top) < float("inf"))
    if TARGET is not None:
        good = good & (target >= 0) & (target < V)
        log_pi = (value - top) * inv_tau - tl.log(total)
        tl.store(OUT.log_pi + row, tl.where(good, log_pi, float("nan")), mask=wanted)
    if OUT.q is not None:
        tl.store(OUT.q + row, tl.where(good, q / total, float("nan")), mask=wanted)
    write_stats(OUT, row, wanted, good, top, total, t, token, inv_tau, entropy_threshold, confidence_threshold)


def linear_stats(
    h: Tensor,
    head: Head,
    inv_tau: float,
    out: RowOutputs,
    *,
    target: Tensor | None = None,
    weights: Tensor | None = None,
    thresholds: tuple[float, float] = NO_THRESHOLDS,
) -> Bases | None:
    """`row_stats` of the logits of `fused` hidden states h (N, d), none of which is written; in one launch.

    Args:
        weights: (N, V) in half precision, becomes e^((z - base) / tau), times the softcap's slope for a target: rounded
            as softmax weights may be, which rounded logits would not give. The bases are returned.
    """
    (rows, depth), weight = h.shape, head.weight
    if not rows:
        return None
    tiles = tile_shape(rows, h.device, full=weights is not None)
    blocks = triton.cdiv(rows, tiles.BN)
    size, splits = split(len(weight), tiles.BV, blocks, h.device)
    parts = torch.empty(splits, FIELDS.value, rows, dtype=torch.float32, device=h.device)
    bases = None
    if weights is not None:
        bases = torch.empty(triton.cdiv(len(weight), tiles.BV), rows, dtype=torch.float32, device=h.device)
    launch(
        _linear_stats_kernel, (blocks, splits), h.device,
        (
            matrix(h), matrix(weight), depth, float(head.scale), float(head.softcap), target, out, matrix(weights),
            bases, parts, counters(blocks, h.device), rows, len(weight), size, inv_tau, *thresholds,
        ),
        {"CAP": head.softcap != 0, "CHUNK": 2048 // tiles.BN, **tiles.constants(depth)},
        **tiles.options,
    )  # fmt: skip
    return None if bases is None else Bases(bases, tiles.BV)


def linear_row(
    h: Tensor, head: Head, inv_tau: float, names: Sequence[str], thresholds: tuple[float, float] = NO_THRESHOLDS
) -> RowOutputs:
    """Statistics of the logits of h (N, d): from tiles where no logit need be written, else from blocks."""
    out = outputs(len(h), h.device, *names)
    if fused(h, head.weight):
        linear_stats(h, head, inv_tau, out, thresholds=thresholds)
        return out
    scratch = Scratch(len(h), head.weight.shape[0], h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        row_stats(z, inv_tau, out.rows(rows), thresholds=thresholds)
    return out


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """`reference.relaxed_stats`."""
    check(z)
    thresholds = _thresholds(entropy_threshold, confidence_threshold)
    return _relaxed(row_stats(z, 1.0 / tau, outputs(len(z), z.device, *STATS), thresholds=thresholds))


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats`."""
    check(h, head.weight)
    return _relaxed(linear_row(h, head, 1.0 / tau, STATS, _thresholds(entropy_threshold, confidence_threshold)))


def _thresholds(entropy: float | None, confidence: float | None) -> tuple[float, float]:
    return -math.inf if entropy is None else float(entropy), math.inf if confidence is None else float(confidence)


def _relaxed(out: RowOutputs) -> RelaxedStats:
    return RelaxedStats(out.max_prob, out.lse, out.entropy, out.token, out.mask)
