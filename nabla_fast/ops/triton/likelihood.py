"""`log_likelihood_gradient`: log pi of the tokens and its gradient with respect to hidden states, by blocks of rows.

Work: 2 N V d operations for the logits, as much for the gradient; twice the latter if h is float32 and W bfloat16. Of a
block of logits the first launch makes log pi and 1 - p, the sum of the other entries' p, the second the weights.
Without a gradient, half-precision logits are not written: one launch in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._launch import check
from nabla_fast.ops.triton._matmul import (
    Scratch,
    fused,
    logits_in_blocks,
)
from nabla_fast.ops.triton._row_stats import RowOutputs, outputs, row_stats
from nabla_fast.ops.triton._softmax import (
    weight_dtypes,
    write_weights,
)
from nabla_fast.ops.triton.stats import linear_stats
from nabla_fast.ops.types import (
    Head,
    LogLikelihood,
)


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> LogLikelihood:
    """`reference.log_likelihood_gradient`; a token outside the vocabulary gives NaN."""
    check(h, head.weight)
    (count, depth), vocabulary = h.shape, head.weight.shape[0]
    log_pi = torch.empty(count, dtype=torch.float32, device=h.device)
    gradient, tokens = log_pi.new_empty(count if need_grad else 0, depth), tokens.contiguous()
    if not need_grad and fused(h, head.weight):
        linear_stats(h, head, 1.0, RowOutputs(log_pi=log_pi), target=tokens)
        return LogLikelihood(log_pi, gradient)
    scratch = Scratch(count, vocabulary, h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        target, out = tokens[rows], outputs(len(z), h.device, "top", "max_prob", "q")
        row_stats(z, 1.0, out._replace(log_pi=log_pi[rows]), target=target)
        if need_grad:
            weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
            write_weights(
                weights, z, 1.0, "likelihood", out.top, out.max_prob, target=target, q=out.q, softcap=head.softcap
            )
            times_rows(weights, head.weight, gradient[rows], alpha=head.scale)
    return LogLikelihood(log_pi, gradient)
