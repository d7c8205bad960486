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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import (
    INTERPRET,
    architecture,
    check,
    counters,
    last_to_arrive,
    launch,
    run,
    split,
    strides,
)
from nabla_fast.ops.triton._matmul import (
    Scratch,
    capped,
    logits_in_blocks,
    products,
)
from nabla_fast.ops.triton._row_scan import scan_row
from nabla_fast.ops.triton._softmax import (
    Row,
    combine,
    joined,
    new_state,
    rescale,
    shift,
    store_state,
)
from nabla_fast.ops.types import (
    Head,
    RelaxedStats,
)

# Of one part of a row: max, sums, token.
PART_FIELDS = tl.constexpr(5)


@triton.jit(do_not_specialize=["rows"])
def _row_state_kernel(
    Z,
    Z_n,
    Z_v,
    SOFT,
    SOFT_n,
    SOFT_v,
    HARD,
    HARD_n,
    HARD_v,
    G,
    G_n,
    G_v,
    ORIGIN,
    HELD,
    STATE,
    TOKENS,
    rows,
    V,
    size,
    inv_tau,
    ENTROPY: tl.constexpr,
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
    top, total, t, q, highest, token = scan_row(
        Z, Z_n, Z_v, SOFT, SOFT_n, SOFT_v, HARD, HARD_n, HARD_v, G, G_n, G_v, origin, -1, row,
        start, tl.minimum(start + size, V), V, inv_tau, ENTROPY, False, TILE, LANES,
    )  # fmt: skip
    store_state(STATE, TOKENS, split, tl.num_programs(1), row, rows, None, top, total, t, q, highest, token)


def row_state(
    z: Tensor,
    inv_tau: float,
    *,
    entropy: bool = False,
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    gradient: Tensor | None = None,
    origin: Tensor | None = None,
    held: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial states of ``softmax((z + soft) / tau)``, hard tokens of z + hard, sums with a dense gradient.

    The gradient is taken relative to ``origin`` (N,), its value at the row's likeliest token: only differences matter,
    and G - <p, G> would cancel where that token is nearly certain. Rows with ``held`` set keep what ``state`` has. One
    program per row where rows are many, else several per row.
    """
    rows, vocabulary = z.shape
    tile, lanes = tile_of_row(z, plain=soft is None and hard is None and gradient is None)
    size, splits = split(vocabulary, tile * lanes, rows, z.device, waves=4)
    state = state or new_state(splits, rows, z.device)
    if rows:
        run(
            _row_state_kernel, (rows, splits), z.device,
            Z=z, **strides("Z", z, "nv"), SOFT=soft, **strides("SOFT", soft, "nv"),
            HARD=hard, **strides("HARD", hard, "nv"), G=gradient, **strides("G", gradient, "nv"), ORIGIN=origin,
            HELD=held, STATE=state[0], TOKENS=state[1], rows=rows, V=vocabulary, size=size, inv_tau=inv_tau,
            ENTROPY=entropy, TILE=tile, LANES=lanes, num_warps=4,
        )  # fmt: skip
    return state


@triton.jit
def _put(OUT, row, value):
    if OUT is not None:
        tl.store(OUT + row, value)


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
    nan = tl.where(good, 0.0, float("nan"))
    log_total = tl.log(total)
    max_prob = 1.0 / total + nan
    _put(TOP, row, top)
    _put(MAX_PROB, row, max_prob)
    _put(LSE, row, top * inv_tau + log_total + nan)
    _put(TOKEN, row, tl.where(good, token, -1).to(tl.int64))
    if ENTROPY is not None:
        entropy = log_total - t / total + nan
        tl.store(ENTROPY + row, entropy)
        _put(MASK, row, good & (entropy >= entropy_threshold) & (max_prob <= confidence_threshold))
    if G is not None:
        tl.store(ORIGIN + row, origin)
    if TARGET is not None:
        entry = tl.minimum(tl.maximum(target, 0), V - 1)
        nan = tl.where(entry == target, nan, float("nan"))
        z = tl.load(Z + row * Z_n + entry * Z_v).to(tl.float32)
        tl.store(LOG_PI + row, (z - top) * inv_tau - log_total + nan)
    _put(Q, row, q / total + nan)


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

    top: Tensor | None = None
    max_prob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    token: Tensor | None = None
    mask: Tensor | None = None
    origin: Tensor | None = None
    q: Tensor | None = None
    log_pi: Tensor | None = None


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
        target: (N,) int64. An entry outside the vocabulary has q and log_pi NaN.
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
    max = tl.full([BN], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BN], tl.float32)
    sum_exp_logit = tl.zeros([BN], tl.float32)
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
        token = tl.where(high > max, first + lowest, token)
        new_max = tl.maximum(max, high)
        base = shift(new_max)
        sum_exp, sum_exp_logit, _ = rescale(max, sum_exp, sum_exp_logit, sum_exp_logit, base, inv_tau)
        max = new_max
        difference = (z - base[:, None]) * inv_tau
        e = tl.exp(difference)
        sum_exp += tl.sum(e, axis=1)
        sum_exp_logit += tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
    store_state(
        STATE,
        TOKENS,
        split,
        tl.num_programs(1),
        row,
        rows,
        wanted,
        max,
        sum_exp,
        sum_exp_logit,
        sum_exp_logit,
        max,
        token,
    )


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
    """Tile shape (BN, BV, BD) and launch options that spill nowhere (`tests/ops/test_triton_compile.py`).

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


def linear_row(
    h: Tensor,
    head: Head,
    inv_tau: float,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> Row:
    """Statistics of the logits of h (N, d): from tiles where no logit need be written, else from blocks."""
    thresholds = (entropy_threshold, confidence_threshold)
    if fused(h, head):
        return combine(linear_state(h, head, inv_tau), inv_tau, *thresholds)
    scratch = Scratch(len(h), head.weight.shape[0], h.device)
    found = [
        combine(row_state(z, inv_tau, entropy=True), inv_tau, *thresholds)
        for _, z in logits_in_blocks(h, head, scratch)
    ]
    return joined(found) if found else combine(new_state(1, 0, h.device), inv_tau)


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """`reference.relaxed_stats`."""
    check(z)
    out = outputs(len(z), z.device, "max_prob", "lse", "entropy", "token", "mask")
    row_stats(z, 1.0 / tau, out, entropy_threshold=entropy_threshold, confidence_threshold=confidence_threshold)
    return RelaxedStats(out.max_prob, out.lse, out.entropy, out.token, out.mask)


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats`."""
    check(h, head.weight)
    return linear_row(h, head, 1.0 / tau, entropy_threshold, confidence_threshold).stats
