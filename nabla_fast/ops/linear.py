"""Products of few rows on a CPU: not one of the method's operators, but what a decoded token's time is made of.

PyTorch's libraries reach the memory's bandwidth for one row of float32 at best. The native kernel reads a weight once
whatever the number of rows, in float32, half precision, or as 8-bit integers with a scale for each row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nabla_fast.ops import native

# Above it, PyTorch's products of float32 are as fast.
MOST_ROWS = 16
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


# It is asked for every layer of every token.
@functools.cache
def _available() -> bool:
    return native.has("linear")
