# mypy: allow-untyped-defs, allow-incomplete-defs
"""`token_diff`: first changed position and number of changes per row, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton._launch import check, launch
from nabla_fast.ops.types import TokenDiff


@triton.jit(do_not_specialize=["OLD_b", "NEW_b", "length"])
def _token_diff_kernel(OLD, OLD_b, OLD_m, NEW, NEW_b, NEW_m, FIRST, COUNT, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = tl.full([BLOCK], 9223372036854775807, tl.int64)
    count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, length, BLOCK):
        at = (start + lane).to(tl.int64)
        inside = at < length
        old = tl.load(OLD + row * OLD_b + at * OLD_m, mask=inside, other=0)
        new = tl.load(NEW + row * NEW_b + at * NEW_m, mask=inside, other=0)
        changed = inside & (old != new)
        first = tl.minimum(first, tl.where(changed, at, 9223372036854775807))
        count += changed.to(tl.int64)
    tl.store(FIRST + row, tl.minimum(tl.min(first, axis=0), length))
    tl.store(COUNT + row, tl.sum(count, axis=0))


def token_diff(old: Tensor, new: Tensor) -> TokenDiff:
    """`reference.token_diff`."""
    check(old, new)
    rows, length = old.shape
    first, count = (torch.empty(rows, dtype=torch.int64, device=old.device) for _ in range(2))
    if rows:
        arguments = (old, *old.stride(), new, *new.stride(), first, count, length)
        launch(_token_diff_kernel, (rows,), old.device, arguments, {"BLOCK": 512})
    return TokenDiff(first, count)
