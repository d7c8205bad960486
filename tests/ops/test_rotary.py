"""`rotary` by its meaning and by Triton, against products and sums written out, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from back_ends import INTERPRETED
from torch import Tensor

from nabla_fast.ops.rotary import reference, rotary

BACK_ENDS = ["triton"] if INTERPRETED else ["reference", *(["triton-gpu"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rotate(backend: str) -> Any:
    """(q, k, cos, sin, inverse) → rotated q and k."""
    if backend == "reference":
        return reference
    from nabla_fast.ops.triton import rotary as kernel

    return kernel.rotary


def by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.unsqueeze(1)


def inputs(dtype: torch.dtype, shape: tuple[int, int, int, int, int], tables: int) -> list[Tensor]:
    """q and k as attention layers have them, heads inside tokens, and tables for ``tables`` rows."""
    batch, heads, key_heads, tokens, width = shape
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cpu").to(dtype).to(torch.get_default_device())

    q, k = (random(batch, tokens, n, width).transpose(1, 2) for n in (heads, key_heads))
    return [q, k, random(tables, tokens, width), random(tables, tokens, width)]


@pytest.mark.parametrize("backend", BACK_ENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "tables"), [((2, 5, 2, 3, 8), 2), ((3, 17, 1, 2, 6), 1), ((1, 32, 33, 1, 128), 1), ((2, 1, 1, 4, 2), 2)]
)
def test_forward_and_backward(backend: str, dtype: torch.dtype, shape: Any, tables: int) -> None:
    q, k, cos, sin = inputs(dtype, shape, tables)
    function = rotate(backend)
    ours = function(q, k, cos, sin, False)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    theirs = [by_hand(x, cos, sin) for x in leaves]
    weights = [torch.randn(x.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu") for x in theirs]
    weights = [w.to(x) for w, x in zip(weights, theirs, strict=True)]
    gradients = torch.autograd.grad(theirs, leaves, weights)
    back = function(*weights, cos, sin, True)
    for a, b in zip([*ours, *back], [*theirs, *gradients], strict=True):
        assert a.dtype == dtype
        # The interpreter cuts to bfloat16 where a GPU rounds.
        tolerance = 0.02 if INTERPRETED and dtype == torch.bfloat16 else 0
        torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACK_ENDS)
def test_views(backend: str) -> None:
    q, k, cos, sin = inputs(torch.float32, (2, 4, 3, 5, 16), 2)
    views = [q[:, 1:, ::2, 4:12], k[:, ::2, 1:4, 8:], cos[:, :3, ::2], sin[:, :3, :8]]
    for a, x in zip(rotate(backend)(*views, False), views, strict=False):
        torch.testing.assert_close(a, by_hand(x, *views[2:]), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="the operator runs its meaning on a CPU, whatever Triton does")
def test_the_operator() -> None:
    q, k, cos, sin = (x.double() for x in inputs(torch.float32, (2, 4, 2, 5, 6), 1))
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    weights = [torch.randn_like(x) for x in (q, k)]
    gradients = torch.autograd.grad(rotary(*leaves, cos, sin), leaves, weights)
    theirs = torch.autograd.grad([by_hand(x, cos, sin) for x in leaves], leaves, weights)
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.nabla_fast.rotary.default, (*leaves, cos, sin, False))
