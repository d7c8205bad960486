# mypy: allow-untyped-defs, allow-incomplete-defs
"""Statistics of rows of logits in memory, in one read of them and one launch.

Where several programs share a row, the last of them to finish merges what all have found.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import counters, last_to_arrive, launch, split
from nabla_fast.ops.triton._row_scan import scan_row
from nabla_fast.ops.triton._softmax import rescale, shift

# Of one part of a row: max, sums, token.
PART_FIELDS = tl.constexpr(5)


@triton.jit
def put(OUT, row, mask, value):
    """Writes a result, if it is wanted."""
    if OUT is not None:
        tl.store(OUT + row, value, mask=mask)


@triton.jit
def write_stats(
    TOP,
    MAX_PROB,
    LSE,
    ENTROPY,
    TOKEN,
    MASK,
    row,
    mask,
    good,
    top,
    total,
    t,
    token,
    inv_tau,
    entropy_threshold,
    confidence_threshold,
):
    """Writes those results of a row, or a block of rows, that are wanted; a row that is not ``good`` has none."""
    nan = tl.where(good, 0.0, float("nan"))
    log_total = tl.log(total)
    max_prob = 1.0 / total + nan
    put(TOP, row, mask, top)
    put(MAX_PROB, row, mask, max_prob)
    put(LSE, row, mask, top * inv_tau + log_total + nan)
    put(TOKEN, row, mask, tl.where(good, token, -1).to(tl.int64))
    if ENTROPY is not None:
        entropy = log_total - t / total + nan
        tl.store(ENTROPY + row, entropy, mask=mask)
        put(MASK, row, mask, good & (entropy >= entropy_threshold) & (max_prob <= confidence_threshold))


@triton.jit
def _row_stats_kernel(
    Z,
    Z_n,
    Z_v,
    G,
    G_n,
    AT,
    TARGET,
    TOP,
    MAX_PROB,
    LSE,
    ENTROPY,
    TOKEN,
    MASK,
    ORIGIN,
    Q,
    LOG_PI,
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
        origin = tl.load(G + row * G_n + tl.maximum(tl.load(AT + row), 0)).to(tl.float32)
        origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    target = -1
    if TARGET is not None:
        target = tl.load(TARGET + row)
    start = split * size
    top, total, t, q, _, token = scan_row(
        Z, Z_n, Z_v, None, 0, 0, None, 0, 0, G, G_n, 1, origin, target, row, start, tl.minimum(start + size, V), V,
        inv_tau, ENTROPY is not None, TARGET is not None, TILE, LANES,
    )  # fmt: skip
    if SPLITS > 1:
        part = PARTS + (row * splits + split) * PART_FIELDS
        tl.store(part, top)
        tl.store(part + 1, total)
        tl.store(part + 2, t)
        tl.store(part + 3, q)
        tl.store(part + 4, token.to(tl.float32, bitcast=True))
        if not last_to_arrive(COUNTER + row, splits):
            return
        top, total, t, q, token = _merge_parts(PARTS + row * splits * PART_FIELDS, splits, inv_tau, SPLITS)
    good = (total == total) & (tl.abs(top) < float("inf"))
    if TARGET is not None:
        entry = tl.minimum(tl.maximum(target, 0), V - 1)
        good = good & (entry == target)
    write_stats(
        TOP, MAX_PROB, LSE, ENTROPY, TOKEN, MASK, row, None, good, top, total, t, token, inv_tau, entropy_threshold,
        confidence_threshold,
    )  # fmt: skip
    nan = tl.where(good, 0.0, float("nan"))
    if G is not None:
        tl.store(ORIGIN + row, origin)
    if TARGET is not None:
        z = tl.load(Z + row * Z_n + entry * Z_v).to(tl.float32)
        tl.store(LOG_PI + row, (z - top) * inv_tau - tl.log(total) + nan)
    put(Q, row, None, q / total + nan)


@triton.jit
def _merge_parts(PARTS, splits, inv_tau, SPLITS: tl.constexpr):
    """The states of all parts of a row, merged; past the cache of this multiprocessor, which others do not write to."""
    part = tl.arange(0, SPLITS)
    inside = part < splits
    at = PARTS + part * PART_FIELDS
    max = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    t = tl.load(at + 2, mask=inside, other=0.0, cache_modifier=".cg")
    q = tl.load(at + 3, mask=inside, other=0.0, cache_modifier=".cg")
    token = tl.load(at + 4, mask=inside, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    top = tl.max(max, axis=0)
    total, t, q = rescale(max, total, t, q, shift(top), inv_tau)
    token = tl.min(tl.where(inside & (max == top), token, 2147483647), axis=0)
    return top, tl.sum(total, axis=0), tl.sum(t, axis=0), tl.sum(q, axis=0), token


_UNWANTED: Any = None


class RowOutputs(NamedTuple):
    """What `row_stats` writes; None is not wanted.

    Attributes:
        top: (N,) the maximum that the softmax is taken relative to.
        max_prob: (N,) the largest probability, which is what e^((z - top) / tau) is to be multiplied with.
        lse, entropy, token, mask: as in `RelaxedStats`.
        origin: (N,) G at the tokens that are given.
        q: (N,) <p, G - origin>; for a target 1 - p of it, the sum of the others' p.
        log_pi: (N,) log p of the target.
    """

    top: Tensor = _UNWANTED
    max_prob: Tensor = _UNWANTED
    lse: Tensor = _UNWANTED
    entropy: Tensor = _UNWANTED
    token: Tensor = _UNWANTED
    mask: Tensor = _UNWANTED
    origin: Tensor = _UNWANTED
    q: Tensor = _UNWANTED
    log_pi: Tensor = _UNWANTED

    def rows(self, index: slice) -> RowOutputs:
        """Of some rows."""
        return RowOutputs(*(x if x is None else x[index] for x in self))


def outputs(rows: int, device: torch.device, *names: str) -> RowOutputs:
    """Memory for those outputs, each with its own: an operator's results may not share it."""
    dtypes = {"token": torch.int64, "mask": torch.bool}
    return RowOutputs(**{n: torch.empty(rows, dtype=dtypes.get(n, torch.float32), device=device) for n in names})


def row_stats(
    z: Tensor,
    inv_tau: float,
    out: RowOutputs,
    *,
    gradient: Tensor | None = None,
    at: Tensor | None = None,
    target: Tensor | None = None,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RowOutputs:
    """Statistics of ``softmax(z / tau)`` in one launch, and what is said of a gradient or a target.

    Args:
        gradient: G (N, V), which is taken relative to its value at the tokens ``at`` (N,): only differences matter, and
            G - <p, G> would cancel where a token is nearly certain.
        target: (N,) int64. A row whose target is outside the vocabulary has no statistics, as one without meaning.
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
        (
            z, *z.stride(), gradient, None if gradient is None else gradient.stride(0), at, target, *out[:6],
            *out[6:], parts, counter, vocabulary, size, inv_tau,
            -math.inf if entropy_threshold is None else float(entropy_threshold),
            math.inf if confidence_threshold is None else float(confidence_threshold),
        ),
        {"SPLITS": triton.next_power_of_2(splits), "TILE": tile, "LANES": lanes},
    )  # fmt: skip
    return out


def tile_of_row(z: Tensor, plain: bool) -> tuple[int, int]:
    """Tile and lanes of `scan_row`: 16 bytes per thread and row of the tile, so that a lane stays within one thread.

    Further operands take registers: half the tile.
    """
    return 8 if plain else 4, 1024 if z.element_size() == 2 else 512
