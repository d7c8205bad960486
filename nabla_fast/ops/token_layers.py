"""Layers on a CPU without a derivative, a native kernel each: not the method's operators, but what a token waits for.

PyTorch takes seven operators for an RMS norm, fourteen for a rotary embedding, and copies keys and values for queries
that share them; a token of a small model spends as long on that as on its products. A row's result is the same
bits whatever is beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_rms_norm = native.define("native_rms_norm(Tensor x, Tensor? weight, float epsilon, bool offset) -> Tensor")
_rotary = native.define("native_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
_attention = native.define("native_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def available() -> bool:
    """Whether the native library has the kernels."""
    return all(native.has(name) for name in ("rms_norm", "rotary", "attention"))


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32, rounded once.

    Args:
        x: (..., d) float32, bfloat16 or float16.
        weight: (d,) of the same dtype; None for ones.
        offset: takes one more than ``weight``.

    Returns:
        (..., d) of the dtype of ``x``, contiguous.
    """
    out: Tensor = _rms_norm(x, weight, epsilon, offset)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`nabla_fast.ops.rotary.rotary`, computed in float32 and rounded once."""
    rotated: tuple[Tensor, Tensor] = _rotary(q, k, cos, sin)
    return rotated


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, in float32, rounded once.

    Args:
        q: (B, heads, S, D) float32, bfloat16 or float16.
        k: (B, key heads, T, D) of the same dtype; the number of heads is a multiple of that of key heads.
        v: (B, key heads, T, E) of the same dtype.
        mask: bool (B or 1, heads or 1, S or 1, T), True where a query reads a column; None for everywhere. A query that
            reads none gets zeros.

    Returns:
        (B, S, heads, E), contiguous.
    """
    out: Tensor = _attention(q, k, v, mask, scale)
    return out


@torch.library.register_fake("nabla_fast::native_rms_norm")
def _fake_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("nabla_fast::native_rotary")
def _fake_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@torch.library.register_fake("nabla_fast::native_attention")
def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
