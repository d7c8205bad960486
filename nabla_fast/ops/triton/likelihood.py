# mypy: allow-untyped-defs, allow-incomplete-defs
"""`log_likelihood_gradient`: log pi of the tokens and its gradient with respect to hidden states, by blocks of rows.

Work: 2 N V d operations for the logits, as much for the gradient; twice the latter if h is float32 and W bfloat16. Of a
block of logits the first launch makes log pi and 1 - p, the sum of the other entries' p, the second the weights.
Without a gradient, half-precision states need one launch in all, and with one in bfloat16 their logits are never
written: weights are, by the launch that makes log pi, relative to maxima that the second launch takes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._launch import check, launch, matrix
from nabla_fast.ops.triton._matmul import (
    Bases,
    Scratch,
    cap_slope,
    fused,
    half_blocks,
    logits_in_blocks,
)
from nabla_fast.ops.triton._row_stats import row_stats
from nabla_fast.ops.triton._softmax import RowOutputs, load_row, outputs, weight_dtypes, write_weights
from nabla_fast.ops.triton.stats import linear_stats
from nabla_fast.ops.types import Head, LogLikelihood


@triton.jit(do_not_specialize=["rows"])
def _likelihood_kernel(
    WEIGHTS,
    BASES,
    ROW,
    TARGET,
    rows,
    V,
    softcap,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    e = load_row(WEIGHTS, row, columns, inside, 0.0)
    base = tl.load(BASES + columns // WIDTH * rows + row, mask=inside, other=0.0)
    top, inverse, others = tl.load(ROW.top + row), tl.load(ROW.max_prob + row), tl.load(ROW.q + row)
    if CAP:  # of the target, whose logit its likelihood tells
        others *= cap_slope(tl.load(ROW.log_pi + row) + top - tl.log(inverse), softcap)
    weight = tl.where(columns == tl.load(TARGET + row), others, -e * tl.exp(base - top) * inverse)
    at = WEIGHTS.data + row * WEIGHTS.row_stride + columns
    tl.store(at, weight.to(WEIGHTS.data.dtype.element_ty), mask=inside)


def _finish_weights(weights: Tensor, bases: Bases, row: RowOutputs, target: Tensor, softcap: float) -> None:
    """Weights (R, V) of `linear_stats` as those of the gradient, in their place."""
    (rows, vocabulary), block = weights.shape, 4096
    launch(
        _likelihood_kernel, (rows, triton.cdiv(vocabulary, block)), weights.device,
        (matrix(weights), bases.values, row, target, rows, vocabulary, float(softcap)),
        {"CAP": softcap != 0, "WIDTH": bases.width, "BLOCK": block},
    )  # fmt: skip


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> LogLikelihood:
    """`reference.log_likelihood_gradient`; a token outside the vocabulary gives NaN."""
    check(h, head.weight)
    (count, depth), vocabulary = h.shape, head.weight.shape[0]
    log_pi = torch.empty(count, dtype=torch.float32, device=h.device)
    gradient, tokens = log_pi.new_empty(count if need_grad else 0, depth), tokens.contiguous()
    if not need_grad and fused(h, head.weight):
        linear_stats(h, head, 1.0, RowOutputs(log_pi=log_pi), target=tokens)
        return LogLikelihood(log_pi, gradient)
    if fused(h, head.weight) and h.dtype == torch.bfloat16:  # float16's range does not hold every weight
        for rows, half in half_blocks(count, vocabulary, h.dtype, h.device):
            out = outputs(len(half), h.device, "top", "max_prob", "q")._replace(log_pi=log_pi[rows])
            bases = linear_stats(h[rows], head, 1.0, out, target=tokens[rows], weights=half)
            assert bases is not None
            _finish_weights(half, bases, out, tokens[rows], head.softcap)
            times_rows((half,), head.weight, gradient[rows], alpha=head.scale)
        return LogLikelihood(log_pi, gradient)
    scratch = Scratch(count, vocabulary, h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        target, out = tokens[rows], outputs(len(z), h.device, "top", "max_prob", "q")
        row_stats(z, 1.0, out._replace(log_pi=log_pi[rows]), target=target)
        if need_grad:
            weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
            write_weights(weights, z, 1.0, out, target=target, softcap=head.softcap)
            times_rows(weights, head.weight, gradient[rows], alpha=head.scale)
    return LogLikelihood(log_pi, gradient)
