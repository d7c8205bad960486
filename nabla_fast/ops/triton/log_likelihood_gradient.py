# mypy: allow-untyped-defs, allow-incomplete-defs
"""`log_likelihood_gradient`: log softmax(logits)[token], and its gradient by chunks of the vocabulary.

Work in units of 2 N V d: 1 without the gradient; with it 3 (logits twice, the product with W once).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.operands import Head
from nabla_fast.ops.triton.combine import combine
from nabla_fast.ops.triton.launch import check, run, strides
from nabla_fast.ops.triton.linear_state import linear_state
from nabla_fast.ops.triton.sources import Logits
from nabla_fast.ops.triton.tiles import capped
from nabla_fast.ops.triton.vocabulary_sum import sum_in_chunks
from nabla_fast.ops.triton.weights import write_weights


@triton.jit
def _target_kernel(
    H, H_n, H_d, W, W_v, W_d, D, V, TOKEN, TOP, INVERSE, LOG_PI, scale, softcap, CAP: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(TOKEN + row)
    entry = tl.minimum(tl.maximum(token, 0), V - 1)
    total = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        depth = (start + tl.arange(0, BD)).to(tl.int64)
        inside = depth < D
        h = tl.load(H + row * H_n + depth * H_d, mask=inside, other=0.0).to(tl.float32)
        total += h * tl.load(W + entry * W_v + depth * W_d, mask=inside, other=0.0).to(tl.float32)
    z = capped(tl.sum(total, axis=0), scale, softcap, CAP)
    log_pi = (z - tl.load(TOP + row)) + tl.log(tl.load(INVERSE + row))
    # This sum and the tile's may round differently; a certain token has 0, not more.
    log_pi = tl.where(log_pi > 0, 0.0, log_pi)
    tl.store(LOG_PI + row, tl.where(entry == token, log_pi, float("nan")))


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """`reference.log_likelihood_gradient`; a token outside the vocabulary gives NaN."""
    check(h, head.weight)
    rows, depth = h.shape
    logits = Logits(head, h=h)
    row = combine(linear_state(logits, 1.0)[0], 1.0)
    log_pi = torch.empty(rows, dtype=torch.float32, device=h.device)
    tokens = tokens.contiguous()
    if rows:
        run(
            _target_kernel, (rows,), h.device, H=h, **strides("H", h, "nd"),
            W=head.weight, **strides("W", head.weight, "vd"), D=depth, V=logits.vocabulary, TOKEN=tokens,
            TOP=row.top, INVERSE=row.stats.max_prob, LOG_PI=log_pi, scale=float(head.scale),
            softcap=float(head.softcap), CAP=head.softcap != 0, BD=1024, num_warps=4,
        )  # fmt: skip
    if not need_grad or not rows:
        return log_pi, log_pi.new_empty(0, depth)

    def write(chunk: Tensor, first: int) -> None:
        write_weights(chunk, logits, 1.0, "likelihood", row.top, row.stats.max_prob, first=first, target=tokens)

    return log_pi, sum_in_chunks(logits, head.weight, write).finish(head.scale)
