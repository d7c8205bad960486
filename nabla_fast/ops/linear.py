"""Products with a weight on a CPU: not one of the method's operators, but what a token and a gradient are made of.

For one row of float32, PyTorch's libraries reach the memory's bandwidth at best, and for tens of rows a third to two
thirds of what an AMD processor multiplies. The native kernels read a weight once for few rows, in float32, half
precision, or as 8-bit integers with a scale for each row; more rows of float32 and bfloat16 are multiplied by blocks
of registers, where that was measured to be faster.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, Tables, TokenGradient

# Up to which the weight is read once.
MOST_ROWS = 16
# Up to which blocks of registers are faster than oneDNN, on AMD processors with AVX512.
_MOST_IN_BLOCKS = 256
_THIRDS = 3
_UNIT = 32  # the entries of a row must be a multiple of it
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_native = native.define(
    "native_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, ScalarType dtype) -> Tensor"
)


_native_backward = native.define("native_linear_backward(Tensor grad, Tensor weight) -> Tensor")


@torch.library.register_fake("nabla_fast::native_linear_backward")
def _fake_backward(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


@torch.library.register_fake("nabla_fast::native_linear")
def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies x (..., K) with a weight (N, K) as fast as anything: in the CPU's memory, few rows.

    Both are of one dtype, or the weight is of int8, which needs a scale.
    """
    width = weight.shape[-1]
    return (
        weight.ndim == 2
        and 0 < x.numel() <= _most_rows(weight.dtype) * width
        and width % _UNIT == 0
        and (x.dtype is weight.dtype or weight.dtype is torch.int8)
        and x.dtype in _DTYPES
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and _available()
    )


def backward_fits(grad: Tensor, weight: Tensor) -> bool:
    """Whether `backward` multiplies grad (..., N) with a weight (N, K) as fast as anything."""
    return (
        weight.ndim == 2
        and 0 < grad.numel() <= _MOST_IN_BLOCKS * len(weight)
        and len(weight) % 2 == 0
        and grad.dtype is weight.dtype is torch.bfloat16
        and grad.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and _most_rows(torch.bfloat16) == _MOST_IN_BLOCKS
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


def state(weight: Tensor) -> tuple[int, int, list[float]]:
    """What differs where a weight has changed since: where it lies, its version, and, for changes that PyTorch does not
    count (of ``weight.data``), some numbers."""
    return weight.data_ptr(), weight._version, weight.detach()[:1, :4].flatten().tolist()


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as 8-bit integers (N, K) and a float32 scale (N,) of each row, for `linear`."""
    scale = weight.detach().float().abs().amax(1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return weight.detach().div(scale.unsqueeze(1)).round_().to(torch.int8), scale


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """What reaches the rows of `linear` from its result: grad (..., N) @ weight (N, K), without a derivative."""
    result: Tensor = _native_backward(grad, weight)
    return result


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


# They are asked for every layer of every token.
@functools.cache
def _available() -> bool:
    return native.has("linear")


@functools.cache
def _most_rows(dtype: torch.dtype) -> int:
    """Rows up to which the native kernel is the fastest with a weight of ``dtype``."""
    pairs = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and pairs is not None and pairs())
    fast = is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512" and _available()
    return _MOST_IN_BLOCKS if fast and multiplied else MOST_ROWS


@functools.cache
def is_amd() -> bool:
    """Whether the processor is AMD's, where PyTorch's libraries multiply far below what it can."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
