"""`log_likelihood_gradient`: log pi of the tokens and its gradient with respect to hidden states, by blocks of rows.

Work: 2 N V d operations for the logits, as much for the gradient; twice the latter if h is float32 and W bfloat16. With
the gradient the logits are read once more, without the target: 1 - p is the sum of the other entries' p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.table_matmul import times_rows
from nabla_fast.ops.triton._launch import check
from nabla_fast.ops.triton._matmul import (
    Scratch,
    logits_in_blocks,
)
from nabla_fast.ops.triton._softmax import (
    Row,
    combine,
    weight_dtypes,
    write_weights,
)
from nabla_fast.ops.triton.stats import row_state
from nabla_fast.ops.types import (
    Head,
    LogLikelihood,
)


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> LogLikelihood:
    """`reference.log_likelihood_gradient`; a token outside the vocabulary gives NaN."""
    check(h, head.weight)
    (count, depth), vocabulary = h.shape, head.weight.shape[0]
    log_pi = torch.empty(count, dtype=torch.float32, device=h.device)
    gradient = log_pi.new_empty(count if need_grad else 0, depth)
    scratch = Scratch(count, vocabulary, h.device)
    for rows, z in logits_in_blocks(h, head, scratch):
        row, wanted = combine(row_state(z, 1.0), 1.0), tokens[rows]
        entry = wanted.clamp(0, vocabulary - 1)
        value = z.gather(1, entry.unsqueeze(1)).squeeze(1) - row.top + row.stats.max_prob.log()
        log_pi[rows] = torch.where(entry == wanted, value, torch.nan)
        if need_grad:
            others = torch.where(entry == wanted, _others(z, entry.unsqueeze(1), row), torch.nan)
            weights = scratch.weights(len(z), weight_dtypes(h.dtype, head.weight.dtype))
            write_weights(
                weights, z, 1.0, "likelihood", row.top, row.stats.max_prob, target=entry, q=others,
                softcap=head.softcap,
            )  # fmt: skip
            times_rows(weights, head.weight, gradient[rows], alpha=head.scale)
    return LogLikelihood(log_pi, gradient)


def _others(z: Tensor, entry: Tensor, row: Row) -> Tensor:
    """1 - p of the entries (R, 1) of logits z (R, V), which are put back: (R,)."""
    value = z.gather(1, entry)
    z.scatter_(1, entry, -torch.inf)
    rest = combine(row_state(z, 1.0), 1.0)
    z.scatter_(1, entry, value)
    # A vocabulary of one entry has no others.
    total = torch.where(rest.top == -torch.inf, 0.0, (rest.top - row.top).exp() / rest.stats.max_prob)
    return total * row.stats.max_prob
