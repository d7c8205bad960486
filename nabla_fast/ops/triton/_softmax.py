# mypy: allow-untyped-defs, allow-incomplete-defs
"""Online softmax: a running maximum, and sums relative to it; partial states and how they are merged.

A state has six fields, named as in csrc/cpu/online_softmax.h: max, the maximum of x; with e = exp((x - max) / tau), the
sums sum_exp of e, sum_exp_logit of e (x - max) / tau and sum_exp_grad of e G; the hard token, in memory as the bits of
a float32; and best, the maximum of the values whose argmax it is. Differences are taken before the division by tau, so
logits of 1e4 at tau = 0.05 lose nothing. A NaN or +inf needs no flag of its own: it makes sum_exp NaN, and sum_exp
stays NaN (``tl.max`` drops NaN, ``tl.sum`` does not); best is +inf where such a value is NaN.

Then, what reaches the vocabulary's entries, from logits in memory: their gradients, of two kinds.

    a target     ([v = target] - p) * slope               (gradient of log pi)
    G            p (D - <p, D>) / tau * slope             (straight-through gradient), D = G - G(likeliest token)

For a nearly certain target 1 - p keeps no digits, so it is given as the sum of the other entries' p. slope is the
softcap's, 1 without one. The weights come in float32, or in half precision for a product with a table: as one tensor
where what they are made from was in half precision too, else as two whose sum keeps 16 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import launch, matrix
from nabla_fast.ops.triton._matmul import cap_slope

FIELDS = tl.constexpr(6)

_UNWANTED: Any = None


class RowOutputs(NamedTuple):
    """What is found out about rows, on the host and as an argument of kernels; None is not wanted, or not known.

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
def put_fields(at, step, mask, values):
    """Writes numbers, or blocks of them, that lie ``step`` apart."""
    for i in tl.static_range(len(values)):
        tl.store(at + i * step, values[i], mask=mask)


@triton.jit
def take_state(at, step, inside):
    """The fields of partial states but best, past the cache of this multiprocessor, which others do not write to."""
    max = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
    sum_exp = tl.load(at + step, mask=inside, other=0.0, cache_modifier=".cg")
    sum_exp_logit = tl.load(at + 2 * step, mask=inside, other=0.0, cache_modifier=".cg")
    sum_exp_grad = tl.load(at + 3 * step, mask=inside, other=0.0, cache_modifier=".cg")
    token = tl.load(at + 4 * step, mask=inside, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    return max, sum_exp, sum_exp_logit, sum_exp_grad, token


@triton.jit
def merge(STATE, row, rows, splits, inv_tau, SPLITS: tl.constexpr):
    """The states (fields, splits, N) of a block of rows, merged: all fields but best. A bad row has token -1."""
    part = tl.arange(0, SPLITS)[None, :]
    inside = (part < splits) & (row < rows)[:, None]
    at = STATE + part * rows + row[:, None]
    max, sum_exp, sum_exp_logit, sum_exp_grad, token = take_state(at, splits * rows, inside)
    best = tl.load(at + 5 * splits * rows, mask=inside, other=float("-inf"))
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
def load_row(X, row, columns, inside, other):
    """Values of one row of a matrix in float32."""
    at = X.data + row * X.row_stride + columns.to(tl.int64) * X.column_stride
    return tl.load(at, mask=inside, other=other).to(tl.float32)


@triton.jit
def _weights_kernel(
    Z,
    G,
    SOFT,
    HELD,
    ROW,
    TARGET,
    HIGH,
    LOW,
    V,
    softcap,
    inv_tau,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HELD is not None:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if tl.load(HELD + row) != 0:
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = load_row(Z, row, columns, inside, float("-inf"))
    x = z
    if SOFT is not None:
        x = z + load_row(SOFT, row, columns, inside, 0.0)
    weight = tl.exp((x - tl.load(ROW.top + row)) * inv_tau) * tl.load(ROW.max_prob + row)
    if TARGET is not None:
        weight = tl.where(columns == tl.load(TARGET + row), tl.load(ROW.q + row), -weight)
    else:
        g = load_row(G, row, columns, inside, 0.0) - tl.load(ROW.origin + row)
        # Where p is 0 an infinite G moves nothing; NaN stays.
        weight = tl.where(weight == 0, 0.0, weight * (g - tl.load(ROW.q + row)) * inv_tau)
    if CAP:
        # A -inf logit has weight 0, and a slope that is not a number.
        weight = tl.where(weight == 0, 0.0, weight * cap_slope(z, softcap))
    put_parts(HIGH, LOW, row, columns, inside, weight)


@triton.jit
def put_parts(HIGH, LOW, row, columns, inside, weight):
    """Writes weights in the dtype of HIGH, and what that leaves out where there is a LOW; gives what was written."""
    high = weight.to(HIGH.data.dtype.element_ty)
    tl.store(HIGH.data + row * HIGH.row_stride + columns, high, mask=inside)
    written = high.to(tl.float32)
    if LOW is not None:
        low = (weight - written).to(LOW.data.dtype.element_ty)
        tl.store(LOW.data + row * LOW.row_stride + columns, low, mask=inside)
        written += low.to(tl.float32)
    return written


def write_weights(
    out: tuple[Tensor, ...],
    z: Tensor,
    inv_tau: float,
    row: RowOutputs,
    *,
    gradient: Tensor | None = None,
    target: Tensor | None = None,
    soft: Tensor | None = None,
    held: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Writes the weights of rows z (R, V) into ``out``, one or two (R, V) tensors, and returns it.

    Of ``row``, top and max_prob make p = exp((x - top) / tau) * max_prob; with a gradient, origin and q are D's; with a
    target, q is its 1 - p. Rows with ``held`` set are left alone.
    """
    (rows, vocabulary), block = z.shape, 2048
    high, low = (*map(matrix, out), None)[:2]
    if rows:
        launch(
            _weights_kernel, (rows, triton.cdiv(vocabulary, block)), z.device,
            (*map(matrix, (z, gradient, soft)), held, row, target, high, low, vocabulary, float(softcap), inv_tau),
            {"CAP": softcap != 0, "BLOCK": block},
        )  # fmt: skip
    return out


def weight_dtypes(source: torch.dtype, table: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the weights of a product with a table, made from logits or hidden states of dtype ``source``."""
    if table != torch.bfloat16:  # float16's range does not hold every weight
        return (torch.float32,)
    return (torch.bfloat16,) * (2 if source == torch.float32 else 1)
