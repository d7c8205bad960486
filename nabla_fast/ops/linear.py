"""Products of few rows on a CPU: not one of the method's operators, but what a decoded token's time is made of.

PyTorch's libraries reach the memory's bandwidth for one row of float32 at best. The native kernel reads a weight once
whatever the number of rows, in float32, half precision, or as 8-bit integers with a scale for each row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, Tables, TokenGradient

# Above it, PyTorch's products of float32 are as fast.
MOST_ROWS = 16
_THIRDS = 3
_UNIT = 32  # the entries of a row must be a multiple of it
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_native = native.define(
    "native_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("nabla_fast::native_linear")
def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies x (..., K) with a weight (N, K): few rows, in the CPU's memory.

    Both are of one dtype, or the weight is of int8, which needs a scale.
    """
    width = weight.shape[-1]
    return (
        weight.ndim == 2
        and 0 < x.numel() <= MOST_ROWS * width
        and width % _UNIT == 0
        and (x.dtype is weight.dtype or weight.dtype is torch.int8)
        and x.dtype in _DTYPES
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and _available()
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x @ (scale * weight)^T + bias, summed in float32; without a derivative. `fits` says for what.

    Args:
        x: (..., K) float32, bfloat16 or float16.
        weight: (N, K) of the same dtype, or int8.
        bias: (N,) of any float dtype.
        dtype: of the result: that of ``x``, which is the default, or float32.
        scale: (N,) of any float dtype, with a weight of int8 alone.

    Returns:
        (..., N).
    """
    product: Tensor = _native(x, weight, scale, bias, dtype or x.dtype)
    return product


def token_gradient(factors: TokenGradient, tables: Tables) -> Tensor:
    """`reference.token_gradient`, without a copy in float32 of half-precision tables where `fits`."""
    return reference.token_gradient(factors, tables, product=_times_table)


def logits(h: Tensor, head: Head) -> Tensor:
    """`reference.linear_logits` likewise; without a derivative."""
    return reference.scaled_and_capped(_times_table(h.detach(), head.weight), head)


def _times_table(x: Tensor, table: Tensor, least: torch.dtype = torch.float32) -> Tensor:
    if least == torch.float32 == x.dtype and table.dtype == torch.bfloat16 and len(x) * _THIRDS <= MOST_ROWS:
        # Three bfloat16 numbers have all bits of a float32 one.
        parts, rest = [], x
        for _ in range(_THIRDS):
            parts.append(rest.to(torch.bfloat16))
            rest = rest - parts[-1].float()
        both = torch.cat(parts)
        if fits(both, table):
            return linear(both, table, dtype=torch.float32).view(_THIRDS, len(x), -1).flip(0).sum(0)
    if least == torch.float32 and fits(x, table):
        return linear(x, table, dtype=torch.float32)
    return reference.times_table(x, table, least)


# It is asked for every layer of every token.
@functools.cache
def _available() -> bool:
    return native.has("linear")
