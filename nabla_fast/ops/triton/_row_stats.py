# mypy: allow-untyped-defs, allow-incomplete-defs
"""Statistics of rows of logits in memory, in one read of them and one launch.

Where several programs share a row, the last of them to finish merges what all have found.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import counters, last_to_arrive, launch, matrix, split
from nabla_fast.ops.triton._row_scan import scan_row
from nabla_fast.ops.triton._softmax import RowOutputs, put_fields, rescale, shift, take_state

# Of one part of a row: all of its state but best.
PART_FIELDS = tl.constexpr(5)
NO_THRESHOLDS = (-math.inf, math.inf)


@triton.jit
def put(OUT, row, mask, value):
    """Writes a result, if it is wanted."""
    if OUT is not None:
        tl.store(OUT + row, value, mask=mask)


@triton.jit
def write_stats(OUT, row, mask, good, top, total, t, token, inv_tau, entropy_threshold, confidence_threshold):
    """Writes those results of a row, or a block of rows, that are wanted; a row that is not ``good`` has none."""
    nan = tl.where(good, 0.0, float("nan"))
    log_total = tl.log(total)
    max_prob = 1.0 / total + nan
    put(OUT.top, row, mask, top)
    put(OUT.max_prob, row, mask, max_prob)
    put(OUT.lse, row, mask, top * inv_tau + log_total + nan)
    put(OUT.token, row, mask, tl.where(good, token, -1).to(tl.int64))
    if OUT.entropy is not None:
        entropy = log_total - t / total + nan
        tl.store(OUT.entropy + row, entropy, mask=mask)
        put(OUT.mask, row, mask, good & (entropy >= entropy_threshold) & (max_prob <= confidence_threshold))


@triton.jit
def _row_stats_kernel(
    Z,
    G,
    AT,
    TARGET,
    OUT,
    PARTS,
    COUNTER,
    V,
    size,
    inv_tau,
    entropy_threshold,
    confidence_threshold,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    origin = 0.0
    if G is not None:
        origin = tl.load(G.data + row * G.row_stride + tl.maximum(tl.load(AT + row), 0)).to(tl.float32)
        origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    target = -1
    if TARGET is not None:
        target = tl.load(TARGET + row)
    start = split * size
    top, total, t, q, token, _ = scan_row(
        Z, None, None, G, origin, target, row, start, tl.minimum(start + size, V), V, inv_tau,
        OUT.entropy is not None, TARGET is not None, TILE, LANES,
    )  # fmt: skip
    if SPLITS > 1:
        part = PARTS + (row * splits + split) * PART_FIELDS
        put_fields(part, 1, None, (top, total, t, q, token.to(tl.float32, bitcast=True)))
        if not last_to_arrive(COUNTER + row, splits):
            return
        part = tl.arange(0, SPLITS)
        inside = part < splits
        max, total, t, q, token = take_state(PARTS + row * splits * PART_FIELDS + part * PART_FIELDS, 1, inside)
        top = tl.max(max, axis=0)
        total, t, q = rescale(max, total, t, q, shift(top), inv_tau)
        token = tl.min(tl.where(inside & (max == top), token, 2147483647), axis=0)
        total, t, q = tl.sum(total, axis=0), tl.sum(t, axis=0), tl.sum(q, axis=0)
    good = (total == total) & (tl.abs(top) < float("inf"))
    if TARGET is not None:
        entry = tl.minimum(tl.maximum(target, 0), V - 1)
        good = good & (entry == target)
    write_stats(OUT, row, None, good, top, total, t, token, inv_tau, entropy_threshold, confidence_threshold)
    nan = tl.where(good, 0.0, float("nan"))
    if G is not None:
        tl.store(OUT.origin + row, origin)
    if TARGET is not None:
        z = tl.load(Z.data + row * Z.row_stride + entry * Z.column_stride).to(tl.float32)
        tl.store(OUT.log_pi + row, (z - top) * inv_tau - tl.log(total) + nan)
    put(OUT.q, row, None, q / total + nan)


def row_stats(
    z: Tensor,
    inv_tau: float,
    out: RowOutputs,
    *,
    gradient: Tensor | None = None,
    at: Tensor | None = None,
    target: Tensor | None = None,
    thresholds: tuple[float, float] = NO_THRESHOLDS,
) -> RowOutputs:
    """Statistics of ``softmax(z / tau)`` in one launch, and what is said of a gradient or a target.

    Args:
        gradient: G (N, V), which is taken relative to its value at the tokens ``at`` (N,): only differences matter, and
            G - <p, G> would cancel where a token is nearly certain.
        target: (N,) int64. A row whose target is outside the vocabulary has no statistics, as one without meaning.
        thresholds: least entropy and largest confidence of the mask.
    """
    rows, vocabulary = z.shape
    if not rows:
        return out
    tile, lanes = tile_of_row(z, plain=gradient is None)
    size, splits = split(vocabulary, tile * lanes, rows, z.device, waves=4)
    parts = counter = None
    if splits > 1:
        parts = torch.empty(rows * splits * PART_FIELDS.value, dtype=torch.float32, device=z.device)
        counter = counters(rows, z.device)
    launch(
        _row_stats_kernel, (rows, splits), z.device,
        (matrix(z), matrix(gradient), at, target, out, parts, counter, vocabulary, size, inv_tau, *thresholds),
        {"SPLITS": triton.next_power_of_2(splits), "TILE": tile, "LANES": lanes},
    )  # fmt: skip
    return out


def tile_of_row(z: Tensor, plain: bool) -> tuple[int, int]:
    """Tile and lanes of `scan_row`: 16 bytes per thread and row of the tile, so that a lane stays within one thread.

    Further operands take registers: half the tile.
    """
    return 8 if plain else 4, 1024 if z.element_size() == 2 else 512
