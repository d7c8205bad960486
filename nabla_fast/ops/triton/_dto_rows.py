# mypy: allow-untyped-defs, allow-incomplete-defs
"""The small launches of a DTO step: who moves, and Adam. None of them waits for the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import run, strides
from nabla_fast.ops.triton._softmax import (
    float_rows,
    merge,
    shift,
)
from nabla_fast.ops.types import (
    DTOInputs,
    DTOOptions,
    DTOState,
)


@triton.jit(do_not_specialize=["rows", "splits", "made", "limit"])
def _decide_kernel(
    STATE,
    TOKENS,
    EXPECTED,
    STEP,
    CURRENT,
    HELD,
    TOP,
    INVERSE,
    Q,
    rows,
    splits,
    made,
    limit,
    inv_tau,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    # A row that was held before has no new state.
    inside = inside & (tl.load(HELD + row, mask=inside, other=1) == 0)
    top, total, _, q, token = merge(STATE, TOKENS, row, rows, splits, inv_tau, SPLITS)
    expected = tl.load(EXPECTED + row, mask=inside, other=0)
    step = tl.load(STEP + row, mask=inside, other=0) + made
    token = tl.where(step < 0, -1, token.to(tl.int64))  # there is no such learning rate
    held = (token != expected) | (token < 0) | (step >= limit)
    tl.store(CURRENT + row, token, mask=inside)
    tl.store(HELD + row, held.to(tl.int32), mask=inside)
    tl.store(TOP + row, top, mask=inside)
    tl.store(INVERSE + row, 1.0 / total, mask=inside)
    tl.store(Q + row, q / total, mask=inside)


@triton.jit
def _group_held(HELD, FIRST, LAST, row):
    """Whether the row, or one of its group, is held."""
    held = tl.load(HELD + row)
    if FIRST is not None:
        last = tl.load(LAST + row)
        for start in range(tl.load(FIRST + row), last, 128):
            member = start + tl.arange(0, 128)
            held = tl.maximum(held, tl.max(tl.load(HELD + member, mask=member < last, other=0), axis=0))
    return held != 0


@triton.jit
def _adam(P, M, S, inside, grad, rate, correction, decay):
    p = tl.load(P, mask=inside, other=0.0)
    grad += tl.where(decay == 0, 0.0, decay * p)  # the logit of a removed token is -inf
    m = tl.load(M, mask=inside, other=0.0)
    m += (grad - m) * (1 - 0.9)
    s = tl.load(S, mask=inside, other=0.0) * 0.999 + grad * grad * (1 - 0.999)
    tl.store(M, m, mask=inside)
    tl.store(S, s, mask=inside)
    tl.store(P, p - rate * m / (tl.sqrt(s * correction) + 1e-8), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts", "made"])
def _update_kernel(
    SUMS,
    STATE,
    P,
    P_n,
    P_d,
    M,
    M_n,
    M_d,
    S,
    S_n,
    S_d,
    HELD,
    FIRST,
    LAST,
    STEP,
    MADE,
    RATE,
    CORRECTION,
    TOP,
    INVERSE,
    Q,
    rows,
    D,
    parts,
    made,
    factor,
    decay,
    inv_tau,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if _group_held(HELD, FIRST, LAST, row):
        # Held, maybe by another row of its group: later passes skip it. Whoever reads the flag concludes the same.
        tl.store(HELD + row, 1)
        return
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    grad = tl.zeros([BD], tl.float32)
    if STATE is not None:
        mean = tl.zeros([BD], tl.float32)
        base = shift(tl.load(TOP + row))
        for part in range(parts):
            weight = tl.exp((tl.load(STATE + part * rows + row) - base) * inv_tau)
            at = SUMS + (part * rows + row) * 2 * D + depth
            grad += weight * tl.load(at, mask=inside, other=0.0)
            mean += weight * tl.load(at + D, mask=inside, other=0.0)
        grad = (grad - tl.load(Q + row) * mean) * tl.load(INVERSE + row) * inv_tau
    else:
        for part in range(parts):
            grad += tl.load(SUMS + (part * rows + row) * D + depth, mask=inside, other=0.0)
    step = tl.load(STEP + row) + made
    place = depth.to(tl.int64)
    _adam(
        P + row * P_n + place * P_d, M + row * M_n + place * M_d, S + row * S_n + place * S_d,
        inside, grad * factor, tl.load(RATE + step), tl.load(CORRECTION + step), decay,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(MADE + row, (made + 1).to(tl.int64))


@triton.jit(do_not_specialize=["rows", "made", "begin"])
def _logits_update_kernel(
    G,
    G_n,
    G_v,
    ORIGIN,
    SOFT,
    SOFT_n,
    SOFT_v,
    P,
    P_n,
    P_d,
    M,
    M_n,
    M_d,
    S,
    S_n,
    S_d,
    HELD,
    FIRST,
    LAST,
    STEP,
    MADE,
    RATE,
    CORRECTION,
    TOP,
    INVERSE,
    Q,
    rows,
    V,
    begin,
    made,
    decay,
    inv_tau,
    BV: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)  # G and the noise are those of the rows from ``begin`` on
    row = begin + local
    if _group_held(HELD, FIRST, LAST, row):
        tl.store(HELD + row, 1)
        return
    column = (tl.program_id(1) * BV + tl.arange(0, BV)).to(tl.int64)
    inside = column < V
    x = tl.load(P + row * P_n + column * P_d, mask=inside, other=float("-inf"))
    if SOFT is not None:
        x += tl.load(SOFT + local * SOFT_n + column * SOFT_v, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp((x - tl.load(TOP + row)) * inv_tau) * tl.load(INVERSE + row)
    g = tl.load(G + local * G_n + column * G_v, mask=inside, other=0.0).to(tl.float32) - tl.load(ORIGIN + row)
    grad = tl.where(p == 0, 0.0, p * (g - tl.load(Q + row)) * inv_tau)
    step = tl.load(STEP + row) + made
    _adam(
        P + row * P_n + column * P_d, M + row * M_n + column * M_d, S + row * S_n + column * S_d,
        inside, grad, tl.load(RATE + step), tl.load(CORRECTION + step), decay,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(MADE + row, (made + 1).to(tl.int64))


class Rows:
    """The rows of a `dto_step` call: parameters, moments, and the flags on the device that stop them.

    Attributes:
        current: (N,) int64 hard token at the last check.
        held: (N,) int32, 1 for a row that makes no further step in this call.
        top, inverse, q: (N,) of the last check, for rows not held: p = exp((x - top) / tau) * inverse; <p, D>.
    """

    def __init__(self, state: DTOState, inputs: DTOInputs, options: DTOOptions) -> None:
        parameters, exp_avg, exp_avg_sq = state[:3]
        self.parameters = parameters
        self.inv_tau, self.decay = 1.0 / options.tau, float(options.weight_decay)
        rows, device = parameters.shape[0], parameters.device
        self.step, self.expected = state.step.contiguous(), state.tokens.contiguous()
        learning_rates, group = inputs.learning_rates, inputs.group
        self.limit = learning_rates.shape[0]
        self.current = torch.empty(rows, dtype=torch.int64, device=device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=device)
        self.made = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top, self.inverse, self.q = float_rows(3, rows, device)
        # Adam's corrections in float64: 1 - 0.999^1 in float32 would be wrong in the fifth digit.
        count = torch.arange(1, self.limit + 1, dtype=torch.float64, device=device)
        rate = (learning_rates.double() / (1 - 0.9**count)).float()
        correction = (1 / (1 - 0.999**count)).float()
        self.first = last = None
        if group is not None:
            group = group.contiguous()
            # Of groups out of order the bounds mean nothing, but stay within the rows.
            self.first = torch.searchsorted(group, group).clamp(max=rows - 1)
            last = torch.searchsorted(group, group, right=True)
        self._common = {
            "P": parameters, **strides("P", parameters, "nd"), "M": exp_avg, **strides("M", exp_avg, "nd"),
            "S": exp_avg_sq, **strides("S", exp_avg_sq, "nd"), "HELD": self.held, "FIRST": self.first, "LAST": last,
            "STEP": self.step, "MADE": self.made, "RATE": rate, "CORRECTION": correction,
            "TOP": self.top, "INVERSE": self.inverse, "Q": self.q, "rows": rows,
            "decay": self.decay, "inv_tau": self.inv_tau,
        }  # fmt: skip

    def decide(self, state: tuple[Tensor, Tensor], made: int, block: slice = slice(None)) -> None:
        """Takes the hard tokens of a pass, and holds the rows that cannot make step number ``made`` of this call."""
        _, splits, rows = state[0].shape
        padded = triton.next_power_of_2(splits)
        size = max(1, 256 // padded)
        run(
            _decide_kernel, (triton.cdiv(rows, size),), self.held.device, STATE=state[0], TOKENS=state[1],
            EXPECTED=self.expected[block], STEP=self.step[block], CURRENT=self.current[block], HELD=self.held[block],
            TOP=self.top[block], INVERSE=self.inverse[block], Q=self.q[block], rows=rows, splits=splits, made=made,
            limit=self.limit, inv_tau=self.inv_tau, BLOCK=size, SPLITS=padded, num_warps=4,
        )  # fmt: skip

    def update_latents(self, sums: Tensor, state: Tensor | None, factor: float, made: int) -> None:
        """Adam on latents, from sums (parts, N, d), or (parts, N, 2, d) relative to the maxima in ``state``."""
        rows, depth = self.parameters.shape
        block = 128
        run(
            _update_kernel, (rows, triton.cdiv(depth, block)), sums.device, SUMS=sums, STATE=state, **self._common,
            D=depth, parts=sums.shape[0], made=made, factor=float(factor), BD=block, num_warps=4,
        )  # fmt: skip

    def update_logits(self, made: int, block: slice, dense: Tensor, origin: Tensor, soft: Tensor | None) -> None:
        """Adam on the logits of a block of rows, from its G and noise, and what G of every row is relative to."""
        vocabulary, size = self.parameters.shape[1], 1024
        run(
            _logits_update_kernel, (len(dense), triton.cdiv(vocabulary, size)), self.held.device,
            G=dense, **strides("G", dense, "nv"), ORIGIN=origin, SOFT=soft, **strides("SOFT", soft, "nv"),
            **self._common, V=vocabulary, begin=block.start, made=made, BV=size, num_warps=4,
        )  # fmt: skip
