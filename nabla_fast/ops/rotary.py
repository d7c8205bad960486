"""Rotary embedding of queries and keys: not one of the method's operators, but a layer's that a GPU runs as one."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.namespace import NAMESPACE
from nabla_fast.ops.registry import LIBRARY

LIBRARY.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse=False) -> (Tensor, Tensor)")
_operator = getattr(torch.ops, NAMESPACE).rotary


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates each half of the features against the other, as transformers' ``apply_rotary_pos_emb`` does.

    Differentiable once in q and k. Products and sums are rounded to the dtype, as in PyTorch's own operators.

    Args:
        q: (B, heads, S, D), any float dtype and strides; D is even.
        k: (B, key heads, S, D).
        cos, sin: (B or 1, S, D) of the dtype of q and k, without gradients.

    Returns:
        Rotated queries and keys, shaped and laid out as they were.
    """
    rotated: tuple[Tensor, Tensor] = _operator(q, k, cos, sin)
    return rotated


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The meaning of `rotary`; with ``inverse`` its transposed, which the backward pass is."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = [x * cos - _turned(x * sin) if inverse else x * cos + _turned(x) * sin for x in (q, k)]
    return turned[0], turned[1]


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    # Imported when it is needed: Triton is.
    kernel = importlib.import_module(f"{__package__}.triton.rotary")
    rotated: tuple[Tensor, Tensor] = kernel.rotary(q, k, cos, sin, inverse)
    return rotated


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
    cos, sin = ctx.saved_tensors
    return *_operator(grad_q, grad_k, cos, sin, not ctx.inverse), None, None, None


LIBRARY.impl("rotary", reference, "CPU")
LIBRARY.impl("rotary", _cuda, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::rotary", _fake, lib=LIBRARY)
torch.library.register_autograd(f"{NAMESPACE}::rotary", _backward, setup_context=_setup, lib=LIBRARY)
