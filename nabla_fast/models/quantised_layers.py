"""Linear layers and tables whose weights another library has quantised.

Layers run as their library has them, with two exceptions of bitsandbytes:

* 8-bit layers (LLM.int8) round their inputs to 8 bits too. Rounding has no gradient, and what it does to a row depends
  on what stands beside it to the last bit, so that a row alone and the same row in a batch, or behind a cached prefix,
  drift apart. In a decode they are multiplied by the numbers that their integers stand for, inputs as they are.
* 4-bit layers on a processor with AVX512-BF16 pack their weights anew for kernels that have no gradient. In a decode
  they do not.

A layer is exchanged for the length of a block; `nabla_fast.models.fused_layers` does it for a decode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_fast.models.temporary import own_attribute, set_attribute, while_any
from nabla_fast.ops import linear as native_linear

_PLAIN = (Tensor, torch.nn.Parameter)
_BITSANDBYTES = "bitsandbytes."
_PACKS = "support_avx512bf16_for_cpu"
# How far apart a product and its gradient may be, as shares of their sizes, by the bits of what they are computed in.
_ADJOINT = {64: 1e-3, 32: 1e-2, 16: 0.1}
_ROWS = 4


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of floating-point numbers, and no subclass that stands for others."""
    return type(weight) in _PLAIN and weight.is_floating_point() and torch.finfo(weight.dtype).bits >= 16


def find_inexact(model: torch.nn.Module) -> tuple[Any, ...]:
    """The layers of bitsandbytes that `exchange` has something to do with."""
    return tuple(x for x in model.modules() if _eight_bit(x) is not None or _packs(x))


@contextmanager
def exact(model: torch.nn.Module) -> Iterator[None]:
    """In this block, products of quantised layers are those of the numbers that their weights stand for."""
    with while_any("quantised", find_inexact(model), exchange):
        yield


def exchange(layer: Any) -> Callable[[], Any]:
    """Gives a layer of `find_inexact` products of its weight's numbers; returns what puts its own back."""
    found = _eight_bit(layer)
    if found is None:
        return set_attribute(layer, _PACKS, False)
    return set_attribute(layer, "forward", partial(_eight_bit_forward, layer, *found))


def _packs(layer: Any) -> bool:
    return type(layer).__module__.startswith(_BITSANDBYTES) and bool(own_attribute(layer, _PACKS))


def _eight_bit(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Integers (N, K) and scales (N,) of an 8-bit layer of bitsandbytes; None for any other layer."""
    state = getattr(layer, "state", None)
    if not type(layer).__module__.startswith(_BITSANDBYTES) or getattr(state, "has_fp16_weights", True):
        return None
    # The first forward pass moves them.
    weight, owners = layer.weight, (state, layer.weight)
    scale = next((x for owner in owners if (x := getattr(owner, "SCB", None)) is not None), None)
    if scale is None or weight.dtype != torch.int8 or weight.ndim != 2:
        return None
    return weight.data, scale.reshape(-1) / 127


def _eight_bit_forward(layer: Any, values: Tensor, scale: Tensor, input: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(input.dtype)
    differentiated = torch.is_grad_enabled() and input.requires_grad
    if not differentiated and not torch.compiler.is_compiling() and native_linear.fits(input, values):
        return native_linear.linear(input, values, bias, scale=scale)
    product: Tensor = _Scaled.apply(input, values, scale)
    return product if bias is None else product + bias


class _Scaled(torch.autograd.Function):
    """input @ (scale * values)^T, differentiable in the input; the product's second factor is not kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return functional.linear(input, _dequantised(values, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, scale = ctx.saved_tensors
        return grad @ _dequantised(values, scale, grad.dtype), None, None


def _dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).mul_(scale.unsqueeze(1))


def dense(module: Any, dtype: torch.dtype) -> Tensor | None:
    """The numbers (N, K) that the weight of a linear layer or an embedding stands for; None where that is not known."""
    weight = module.weight
    eight_bit = _eight_bit(module)
    if eight_bit is not None:
        return _dequantised(*eight_bit, torch.float32).to(dtype)
    four_bit = getattr(weight, "quant_state", None)
    if four_bit is not None and type(weight).__module__.startswith(_BITSANDBYTES):
        from bitsandbytes.functional import dequantize_4bit

        return (
            None if getattr(four_bit, "packing_format_for_cpu", False) else dequantize_4bit(weight, four_bit).to(dtype)
        )
    numbers = weight.dequantize() if type(weight) not in _PLAIN and hasattr(weight, "dequantize") else None
    return numbers.to(dtype) if type(numbers) is Tensor and numbers.shape == weight.shape else None


def computes_in(model: torch.nn.Module) -> torch.dtype | None:
    """The narrowest dtype that quantised layers say they compute in; None if none says so."""
    found = {x for module in model.modules() if isinstance(x := getattr(module, "compute_dtype", None), torch.dtype)}
    floats = [dtype for dtype in found if dtype.is_floating_point]
    return min(floats, key=lambda dtype: torch.finfo(dtype).bits, default=None)


def gradient_fault(model: torch.nn.Module, dtype: torch.dtype, bits: int) -> str | None:
    """Compares the products of quantised linear layers with their gradients; one of each kind and size is tried.

    With f(x) = W x + b and its derivative's transpose Wᵀ, <f(x) - f(0), g> = <x, Wᵀ g> for all x and g. Unlike a finite
    difference of the whole model, that is exact however coarse the layer computes.

    Args:
        dtype: of the layers' inputs.
        bits: how exact layers are.

    Returns:
        What is wrong, in one clause that names a layer; None if nothing is.
    """
    tried = set()
    for name, layer in model.named_modules():
        width = getattr(layer, "in_features", None)
        # Its own parameter or buffer, whatever it is called in its library.
        tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        weight = next((x for x in tensors if x.ndim > 1), None)
        if not isinstance(width, int) or weight is None or is_plain(weight) or weight.is_meta:
            continue
        kind = (type(layer), type(weight), tuple(weight.shape), weight.dtype, getattr(layer, "out_features", None))
        if kind in tried:
            continue
        tried.add(kind)
        fault = _adjoint_fault(layer, width, weight.device, dtype, _ADJOINT[bits])
        if fault is not None:
            return f"its layer {name} ({type(layer).__name__} of {type(weight).__name__}) {fault}"
    return None


def _adjoint_fault(layer: Any, width: int, device: torch.device, dtype: torch.dtype, tolerance: float) -> str | None:
    drawn = torch.randn(2, _ROWS, width, generator=torch.Generator().manual_seed(0))
    x, other = drawn.to(device, dtype)
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        out = layer(at)
        if not out.requires_grad:
            return "passes no gradient on"
        with torch.no_grad():
            nothing = layer(torch.zeros_like(x))
            image = (out.detach() - nothing).double()
            beside = (layer(other) - nothing).double()
        (back,) = torch.autograd.grad(out, at, image.to(out.dtype))
    back = back.double()
    size = image.square().sum().clamp(min=1e-300)
    along = float((x.double() * back).sum() / size) - 1
    across = float(((other.double() * back).sum() - (beside * image).sum()) / (beside.norm() * image.norm() + 1e-300))
    worst = max(abs(along), abs(across))
    if not worst <= tolerance:
        return f"has a gradient that is not that of its product (they are {worst:.2g} apart, relatively)"
    return None
