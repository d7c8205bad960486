# mypy: allow-untyped-defs, allow-incomplete-defs
"""Partial states merged into what callers see: row statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import run
from nabla_fast.ops.triton.online import merge
from nabla_fast.ops.types import RelaxedStats


@triton.jit(do_not_specialize=["rows", "splits"])
def _stats_kernel(
    STATE,
    TOKENS,
    MAX_PROB,
    LSE,
    ENTROPY,
    TOP,
    Q,
    TOKEN,
    MASK,
    rows,
    splits,
    inv_tau,
    entropy_threshold,
    confidence_threshold,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    top, total, t, q, token = merge(STATE, TOKENS, row, rows, splits, inv_tau, SPLITS)
    nan = tl.where(token < 0, float("nan"), 0.0)
    log_total = tl.log(total)
    max_prob = 1.0 / total + nan
    entropy = log_total - t / total + nan
    tl.store(MAX_PROB + row, max_prob, mask=inside)
    tl.store(LSE + row, top * inv_tau + log_total + nan, mask=inside)
    tl.store(ENTROPY + row, entropy, mask=inside)
    tl.store(TOP + row, top, mask=inside)
    tl.store(Q + row, q / total + nan, mask=inside)
    tl.store(TOKEN + row, token.to(tl.int64), mask=inside)
    passes = (token >= 0) & (entropy >= entropy_threshold) & (max_prob <= confidence_threshold)
    tl.store(MASK + row, passes.to(tl.int8), mask=inside)


def float_rows(count: int, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """``count`` float32 tensors (N,), each with memory of its own: an operator's results may not share it."""
    return tuple(torch.empty(rows, dtype=torch.float32, device=device) for _ in range(count))


def _blocks(rows: int, splits: int) -> tuple[tuple[int, ...], dict[str, int]]:
    padded = triton.next_power_of_2(splits)
    block = max(1, 256 // padded)
    return (triton.cdiv(rows, block),), {"BLOCK": block, "SPLITS": padded, "num_warps": 4}


class Row:
    """What a merged state says of every row.

    Attributes:
        stats: `RelaxedStats`.
        top: (N,) the maximum that the softmax is taken relative to.
        q: (N,) <p, G>, where a gradient was given.
    """

    def __init__(self, stats: RelaxedStats, top: Tensor, q: Tensor) -> None:
        self.stats, self.top, self.q = stats, top, q


def combine(
    state: tuple[Tensor, Tensor],
    inv_tau: float,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> Row:
    """Merges the splits of a state."""
    _, splits, rows = state[0].shape
    device = state[0].device
    max_prob, lse, entropy, top, q = float_rows(5, rows, device)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    mask = torch.empty(rows, dtype=torch.bool, device=device)
    grid, options = _blocks(rows, splits)
    if rows:
        run(
            _stats_kernel, grid, device, STATE=state[0], TOKENS=state[1], MAX_PROB=max_prob, LSE=lse, ENTROPY=entropy,
            TOP=top, Q=q, TOKEN=token, MASK=mask.view(torch.int8), rows=rows, splits=splits, inv_tau=inv_tau,
            entropy_threshold=-math.inf if entropy_threshold is None else float(entropy_threshold),
            confidence_threshold=math.inf if confidence_threshold is None else float(confidence_threshold), **options,
        )  # fmt: skip
    return Row(RelaxedStats(max_prob, lse, entropy, token, mask), top, q)


def joined(rows: Sequence[Row]) -> Row:
    """Those of all blocks, in order."""
    stats = RelaxedStats(*(torch.cat(column) for column in zip(*(row.stats for row in rows), strict=True)))
    return Row(stats, torch.cat([row.top for row in rows]), torch.cat([row.q for row in rows]))
