# mypy: allow-untyped-defs, allow-incomplete-defs
"""The small launches of a DTO step: who moves, and Adam. None of them waits for the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import launch, matrix
from nabla_fast.ops.triton._softmax import load_row, merge, outputs, shift
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState


class _Flags(NamedTuple):
    """What kernels read and write of the rows, (N,) each, and by step: see `Rows`."""

    expected: Tensor
    current: Tensor
    held: Tensor
    step: Tensor
    made: Tensor
    first: Tensor | None
    last: Tensor | None
    rate: Tensor
    correction: Tensor


@triton.jit(do_not_specialize=["begin", "rows", "splits", "made", "limit"])
def _decide_kernel(
    STATE,
    FLAGS,
    SOFTMAX,
    begin,
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
    top, total, _, q, token = merge(STATE, row, rows, splits, inv_tau, SPLITS)
    row += begin  # the state is of the rows from there on
    # A row that was held before has no new state.
    inside = inside & (tl.load(FLAGS.held + row, mask=inside, other=1) == 0)
    expected = tl.load(FLAGS.expected + row, mask=inside, other=0)
    step = tl.load(FLAGS.step + row, mask=inside, other=0) + made
    token = tl.where(step < 0, -1, token.to(tl.int64))  # there is no such learning rate
    held = (token != expected) | (token < 0) | (step >= limit)
    tl.store(FLAGS.current + row, token, mask=inside)
    tl.store(FLAGS.held + row, held.to(tl.int32), mask=inside)
    tl.store(SOFTMAX.top + row, top, mask=inside)
    tl.store(SOFTMAX.max_prob + row, 1.0 / total, mask=inside)
    tl.store(SOFTMAX.q + row, q / total, mask=inside)


@triton.jit
def _stays(FLAGS, row):
    """Whether the row, or one of its group, is held; if so the row is held from now on.

    Whoever reads a flag that another program has just set concludes the same.
    """
    held = tl.load(FLAGS.held + row)
    if FLAGS.first is not None:
        last = tl.load(FLAGS.last + row)
        for start in range(tl.load(FLAGS.first + row), last, 128):
            member = start + tl.arange(0, 128)
            held = tl.maximum(held, tl.max(tl.load(FLAGS.held + member, mask=member < last, other=0), axis=0))
    if held != 0:
        tl.store(FLAGS.held + row, 1)
    return held != 0


@triton.jit
def _adam(P, M, S, FLAGS, row, columns, inside, grad, made, decay):
    """Step number ``made`` + 1 of this call for some columns of a row."""
    place = columns.to(tl.int64)
    p_at = P.data + row * P.row_stride + place * P.column_stride
    m_at = M.data + row * M.row_stride + place * M.column_stride
    s_at = S.data + row * S.row_stride + place * S.column_stride
    step = tl.load(FLAGS.step + row) + made
    rate, correction = tl.load(FLAGS.rate + step), tl.load(FLAGS.correction + step)
    p = tl.load(p_at, mask=inside, other=0.0)
    grad += tl.where(decay == 0, 0.0, decay * p)  # the logit of a removed token is -inf
    m = tl.load(m_at, mask=inside, other=0.0)
    m += (grad - m) * (1 - 0.9)
    s = tl.load(s_at, mask=inside, other=0.0) * 0.999 + grad * grad * (1 - 0.999)
    tl.store(m_at, m, mask=inside)
    tl.store(s_at, s, mask=inside)
    tl.store(p_at, p - rate * m / (tl.sqrt(s * correction) + 1e-8), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(FLAGS.made + row, (made + 1).to(tl.int64))


@triton.jit(do_not_specialize=["rows", "parts", "made"])
def _update_kernel(
    SUMS,
    STATE,
    P,
    M,
    S,
    FLAGS,
    SOFTMAX,
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
    if _stays(FLAGS, row):
        return
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = depth < D
    grad = tl.zeros([BD], tl.float32)
    if STATE is not None:
        mean = tl.zeros([BD], tl.float32)
        base = shift(tl.load(SOFTMAX.top + row))
        for part in range(parts):
            weight = tl.exp((tl.load(STATE + part * rows + row) - base) * inv_tau)
            at = SUMS + (part * rows + row) * 2 * D + depth
            grad += weight * tl.load(at, mask=inside, other=0.0)
            mean += weight * tl.load(at + D, mask=inside, other=0.0)
        grad = (grad - tl.load(SOFTMAX.q + row) * mean) * tl.load(SOFTMAX.max_prob + row) * inv_tau
    else:
        for part in range(parts):
            grad += tl.load(SUMS + (part * rows + row) * D + depth, mask=inside, other=0.0)
    _adam(P, M, S, FLAGS, row, depth, inside, grad * factor, made, decay)


@triton.jit(do_not_specialize=["made", "begin"])
def _logits_update_kernel(
    G,
    ORIGIN,
    SOFT,
    P,
    M,
    S,
    FLAGS,
    SOFTMAX,
    V,
    begin,
    made,
    decay,
    inv_tau,
    BV: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)  # G and the noise are those of the rows from ``begin`` on
    row = begin + local
    if _stays(FLAGS, row):
        return
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = column < V
    x = load_row(P, row, column, inside, float("-inf"))
    if SOFT is not None:
        x += load_row(SOFT, local, column, inside, 0.0)
    p = tl.exp((x - tl.load(SOFTMAX.top + row)) * inv_tau) * tl.load(SOFTMAX.max_prob + row)
    g = load_row(G, local, column, inside, 0.0) - tl.load(ORIGIN + row)
    grad = tl.where(p == 0, 0.0, p * (g - tl.load(SOFTMAX.q + row)) * inv_tau)
    _adam(P, M, S, FLAGS, row, column, inside, grad, made, decay)


class Rows:
    """The rows of a `dto_step` call: parameters, moments, and the flags on the device that stop them.

    Attributes:
        current: (N,) int64 hard token at the last check.
        held: (N,) int32, 1 for a row that makes no further step in this call.
        made: (N,) int64 steps of this call.
        softmax: of the last check, top, max_prob and q, for rows not held.
    """

    def __init__(self, state: DTOState, inputs: DTOInputs, options: DTOOptions) -> None:
        self.parameters = state.parameters
        self.inv_tau, self.decay = 1.0 / options.tau, float(options.weight_decay)
        rows, device = len(state.parameters), state.parameters.device
        self.expected = state.tokens.contiguous()
        learning_rates, group = inputs.learning_rates, inputs.group
        self.limit = len(learning_rates)
        self.current = torch.empty(rows, dtype=torch.int64, device=device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=device)
        self.made = torch.zeros(rows, dtype=torch.int64, device=device)
        self.softmax = outputs(rows, device, "top", "max_prob", "q")
        # Adam's corrections in float64: 1 - 0.999^1 in float32 would be wrong in the fifth digit.
        count = torch.arange(1, self.limit + 1, dtype=torch.float64, device=device)
        rate = (learning_rates.double() / (1 - 0.9**count)).float()
        correction = (1 / (1 - 0.999**count)).float()
        first = last = None
        if group is not None:
            group = group.contiguous()
            # Of groups out of order the bounds mean nothing, but stay within the rows.
            first = torch.searchsorted(group, group).clamp(max=rows - 1)
            last = torch.searchsorted(group, group, right=True)
        flags = _Flags(
            self.expected, self.current, self.held, state.step.contiguous(), self.made, first, last, rate, correction
        )
        self._flags = (flags, self.softmax)
        self._adam = (*map(matrix, state[:3]), *self._flags)

    def decide(self, state: Tensor, made: int, begin: int = 0) -> None:
        """Takes the hard tokens of a pass over the rows from ``begin`` on.

        Holds the rows that cannot make step number ``made`` of this call.
        """
        _, splits, rows = state.shape
        padded = triton.next_power_of_2(splits)
        size = max(1, 256 // padded)
        launch(
            _decide_kernel, (triton.cdiv(rows, size),), state.device,
            (state, *self._flags, begin, rows, splits, made, self.limit, self.inv_tau),
            {"BLOCK": size, "SPLITS": padded},
        )  # fmt: skip

    def update_latents(self, sums: Tensor, state: Tensor | None, factor: float, made: int) -> None:
        """Adam on latents, from sums (parts, N, d), or (parts, N, 2, d) relative to the maxima in ``state``."""
        (rows, depth), block = self.parameters.shape, 128
        launch(
            _update_kernel, (rows, triton.cdiv(depth, block)), sums.device,
            (sums, state, *self._adam, rows, depth, len(sums), made, float(factor), self.decay, self.inv_tau),
            {"BD": block},
        )  # fmt: skip

    def update_logits(self, made: int, begin: int, dense: Tensor, origin: Tensor, soft: Tensor | None) -> None:
        """Adam on the logits of the rows from ``begin`` on, from G and noise of these, and the ``origin`` of all G."""
        vocabulary, size = self.parameters.shape[1], 1024
        launch(
            _logits_update_kernel, (len(dense), triton.cdiv(vocabulary, size)), dense.device,
            (
                matrix(dense), origin, matrix(soft), *self._adam, vocabulary, begin, made, self.decay, self.inv_tau,
            ),
            {"BV": size},
        )  # fmt: skip
