# mypy: allow-untyped-defs, allow-incomplete-defs
"""Online softmax: a running maximum, and sums relative to it; partial states and how they are merged.

A state has six fields, named as in csrc/cpu/online_softmax.h: max, the maximum of x; with e = exp((x - max) / tau), the
sums sum_exp of e, sum_exp_logit of e (x - max) / tau and sum_exp_grad of e G; best, the maximum of the values whose
argmax is the hard token; and that token. Differences are taken before the division by tau, so logits of 1e4 at
tau = 0.05 lose nothing. A NaN or +inf needs no flag of its own: it makes sum_exp NaN, and sum_exp stays NaN (``tl.max``
drops NaN, ``tl.sum`` does not); best is +inf where such a value is NaN.

Then, what reaches the vocabulary's entries, from logits in memory: softmax weights, or the logits' gradients.

    SOFTMAX      p                                        (embedding mixture)
    LIKELIHOOD   ([v = target] - p) * slope               (gradient of log pi)
    RELAXED      p (D - <p, D>) / tau * slope             (straight-through gradient), D = G - G(likeliest token)

For a nearly certain target 1 - p keeps no digits, so it is given as the sum of the other entries' p. slope is the
softcap's, 1 without one. The weights come in float32, or in half precision for a product with a table: as one tensor
where what they are made from was in half precision too, else as two whose sum keeps 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import run, strides
from nabla_fast.ops.triton._matmul import (
    cap_slope,
)

FIELDS = 5  # and the token, an integer


def new_state(splits: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the partial states, (fields, splits, N), and their hard tokens, (splits, N)."""
    state = torch.empty(FIELDS, splits, rows, dtype=torch.float32, device=device)
    return state, torch.empty(splits, rows, dtype=torch.int32, device=device)


@triton.jit
def shift(max):
    """What to subtract: the maximum, or 0 where nothing but -inf was seen (-inf - -inf would be NaN)."""
    return tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def rescale(max, sum_exp, sum_exp_logit, sum_exp_grad, base, inv_tau):
    """A state's sums, relative to ``base`` now."""
    moved = (max - base) * inv_tau
    factor = tl.exp(moved)
    # Where the factor is 0, the difference may be -inf; any other number does as well there.
    moved = tl.where(sum_exp > 0, tl.maximum(moved, -1e4), 0.0)
    return sum_exp * factor, (sum_exp_logit + moved * sum_exp) * factor, sum_exp_grad * factor


@triton.jit
def store_state(STATE, TOKENS, split, splits, row, rows, mask, max, sum_exp, sum_exp_logit, sum_exp_grad, best, token):
    """Writes one split's state of one row, or of a block of rows."""
    at = STATE + split * rows + row
    field = splits * rows
    tl.store(at, max, mask=mask)
    tl.store(at + field, sum_exp, mask=mask)
    tl.store(at + 2 * field, sum_exp_logit, mask=mask)
    tl.store(at + 3 * field, sum_exp_grad, mask=mask)
    tl.store(at + 4 * field, best, mask=mask)
    tl.store(TOKENS + split * rows + row, token, mask=mask)


@triton.jit
def merge(STATE, TOKENS, row, rows, splits, inv_tau, SPLITS: tl.constexpr):
    """The states of a block of rows, merged over the splits: all fields but best. A bad row has token -1."""
    part = tl.arange(0, SPLITS)[None, :]
    inside = (part < splits) & (row < rows)[:, None]
    at = STATE + part * rows + row[:, None]
    field = splits * rows
    max = tl.load(at, mask=inside, other=float("-inf"))
    sum_exp = tl.load(at + field, mask=inside, other=0.0)
    sum_exp_logit = tl.load(at + 2 * field, mask=inside, other=0.0)
    sum_exp_grad = tl.load(at + 3 * field, mask=inside, other=0.0)
    best = tl.load(at + 4 * field, mask=inside, other=float("-inf"))
    token = tl.load(TOKENS + part * rows + row[:, None], mask=inside, other=0)
    top = tl.max(max, axis=1)
    sum_exp, sum_exp_logit, sum_exp_grad = rescale(
        max, sum_exp, sum_exp_logit, sum_exp_grad, shift(top)[:, None], inv_tau
    )
    total = tl.sum(sum_exp, axis=1)
    highest = tl.max(best, axis=1)
    token = tl.min(tl.where(best == highest[:, None], token, 2147483647), axis=1)
    good = (total == total) & (tl.abs(top) < float("inf")) & (tl.abs(highest) < float("inf"))
    return top, total, tl.sum(sum_exp_logit, axis=1), tl.sum(sum_exp_grad, axis=1), tl.where(good, token, -1)


@triton.jit
def load_row(X, offset, columns, stride, inside, other):
    """Values of one row in float32."""
    return tl.load(X + offset + columns.to(tl.int64) * stride, mask=inside, other=other).to(tl.float32)


def float_rows(count: int, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """``count`` float32 tensors (N,), each with memory of its own: an operator's results may not share it."""
    return tuple(torch.empty(rows, dtype=torch.float32, device=device) for _ in range(count))


@triton.jit
def _weights_kernel(
    Z,
    Z_n,
    Z_v,
    G,
    G_n,
    G_v,
    ORIGIN,
    SOFT,
    SOFT_n,
    SOFT_v,
    HELD,
    TOP,
    INVERSE,
    Q,
    TARGET,
    HIGH,
    HIGH_n,
    LOW,
    LOW_n,
    V,
    softcap,
    inv_tau,
    KIND: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HELD is not None:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if tl.load(HELD + row) != 0:
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = load_row(Z, row * Z_n, columns, Z_v, inside, float("-inf"))
    x = z
    if SOFT is not None:
        x = z + load_row(SOFT, row * SOFT_n, columns, SOFT_v, inside, 0.0)
    weight = tl.exp((x - tl.load(TOP + row)) * inv_tau) * tl.load(INVERSE + row)
    if KIND == "likelihood":
        weight = tl.where(columns == tl.load(TARGET + row), tl.load(Q + row), -weight)
    if KIND == "relaxed":
        g = load_row(G, row * G_n, columns, G_v, inside, 0.0) - tl.load(ORIGIN + row)
        # Where p is 0 an infinite G moves nothing; NaN stays.
        weight = tl.where(weight == 0, 0.0, weight * (g - tl.load(Q + row)) * inv_tau)
    if CAP:
        # A -inf logit has weight 0, and a slope that is not a number.
        weight = tl.where(weight == 0, 0.0, weight * cap_slope(z, softcap))
    high = weight.to(HIGH.dtype.element_ty)
    tl.store(HIGH + row * HIGH_n + columns, high, mask=inside)
    if LOW is not None:
        tl.store(LOW + row * LOW_n + columns, (weight - high.to(tl.float32)).to(LOW.dtype.element_ty), mask=inside)


def write_weights(
    out: tuple[Tensor, ...],
    z: Tensor,
    inv_tau: float,
    kind: str,
    top: Tensor,
    inverse: Tensor,
    *,
    gradient: Tensor | None = None,
    origin: Tensor | None = None,
    q: Tensor | None = None,
    target: Tensor | None = None,
    soft: Tensor | None = None,
    held: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Writes the weights of rows z (R, V) into ``out``, one or two (R, V) tensors, and returns it.

    ``top`` and ``inverse`` (R,) make p = exp((x - top) / tau) * inverse; ``q`` (R,) is <p, D>, or of a likelihood 1 - p
    of the target. Rows with ``held`` set are left alone.
    """
    rows, vocabulary = z.shape
    block = 2048
    high, low = out[0], out[1] if len(out) > 1 else None
    if rows:
        run(
            _weights_kernel, (rows, triton.cdiv(vocabulary, block)), z.device,
            Z=z, **strides("Z", z, "nv"), G=gradient, **strides("G", gradient, "nv"), ORIGIN=origin,
            SOFT=soft, **strides("SOFT", soft, "nv"), HELD=held, TOP=top, INVERSE=inverse, Q=q, TARGET=target,
            HIGH=high, HIGH_n=high.stride(0), LOW=low, LOW_n=0 if low is None else low.stride(0), V=vocabulary,
            softcap=float(softcap), inv_tau=inv_tau, KIND=kind, CAP=softcap != 0 and kind != "softmax",
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def weight_dtypes(source: torch.dtype, table: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the weights of a product with a table, made from logits or hidden states of dtype ``source``."""
    if table != torch.bfloat16:  # float16's range does not hold every weight
        return (torch.float32,)
    return (torch.bfloat16,) * (2 if source == torch.float32 else 1)
