"""Linear layers of float32 models on AMD processors.

PyTorch multiplies float32 matrices by MKL, which on AMD processors reaches less than half of what oneDNN does, and
oneDNN comes with PyTorch too. Most of a gradient's time is these products, and of a rollout's.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def fast_linear(device: torch.device) -> AbstractContextManager[Any]:
    """In this block, ``linear`` of float32 weights on the CPU that want no gradient goes to oneDNN where MKL is slow.

    A mode of this thread alone: the models, which are on ``device``, stay as they are. Results differ from MKL's by
    rounding.
    """
    return _OneDNN() if device.type == "cpu" and _mkl_is_slow() else nullcontext()


@functools.cache
def _mkl_is_slow() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    # The operator is inductor's, and no part of PyTorch's documented interface.
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and has_operator and torch.backends.mkl.is_available()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and _fits(*args, **(kwargs or {})):
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:  # as in torch.nn.functional
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    usual = input.dtype == weight.dtype == torch.float32 and input.device.type == weight.device.type == "cpu"
    frozen = not torch.is_grad_enabled() or not (weight.requires_grad or (bias is not None and bias.requires_grad))
    return plain and usual and frozen and input.numel() > 0 and bool(torch.backends.mkldnn.enabled)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not torch.is_grad_enabled():
        return _product(input, weight, bias)
    out: Tensor = _Linear.apply(input, weight, bias)
    return out


class _Linear(torch.autograd.Function):
    """input @ weight^T + bias, differentiable in the input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t(), None), None, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return out.view(*rows.shape[:-1], weight.shape[0])
