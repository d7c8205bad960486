"""Linear layers of models on a CPU, by what multiplies fastest.

Products that a native kernel is fastest at (`nabla_fast.ops.linear`) are its own: those of few rows, of which a decoded
token is made, and on AMD processors those of a gradient. Larger ones of float32 models are oneDNN's there: PyTorch
multiplies float32 matrices by MKL, which reaches less than half of what oneDNN does, and oneDNN comes with PyTorch too.

Weights that torchao has quantised to 8-bit integers, with a scale for each row (``Int8WeightOnlyConfig``), are read as
integers where the native kernel multiplies few rows; other products of theirs are torchao's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_fast.models.temporary import own_attribute, set_attribute
from nabla_fast.ops import linear as native_linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# Entries of a weight below which the choice takes longer than any product of few rows.
_LEAST = 2**16
_PLAIN = (Tensor, torch.nn.Parameter)


def find(model: torch.nn.Module) -> tuple[torch.nn.Linear, ...]:
    """The layers that are worth it and whose forward is PyTorch's own: another library may have set one."""
    layers = (module for module in model.modules() if type(module) is torch.nn.Linear)
    return tuple(x for x in layers if x.weight.numel() >= _LEAST and own_attribute(x, "forward") is None)


def exchange(layer: torch.nn.Linear) -> Callable[[], Any]:
    """Makes `linear` the forward pass of a layer; returns what puts its own back.

    A mode of torch_function would reach layers of all kinds, but takes a microsecond of every operator of a model.
    """
    quantised = _int8_rows(layer.weight)
    if quantised is not None:
        return set_attribute(layer, "forward", partial(_int8_forward, layer, *quantised))
    return set_attribute(layer, "forward", lambda input: linear(input, layer.weight, layer.bias))


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers (N, K) and scales (N,) of a weight that torchao has quantised, if that is all it consists of."""
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    rows: Any = weight
    more = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
    if any(getattr(rows, name, None) is not None for name in more):
        return None
    values, scale, zero = rows.qdata, rows.scale, rows.zero_point
    plain = values.dtype == torch.int8 and values.ndim == 2 and values.is_contiguous()
    if not plain or scale.numel() != len(values) or (zero is not None and bool(zero.any())):
        return None
    return values, scale.reshape(-1)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, but for rounding; differentiable in the same tensors."""
    product = None if type(weight) not in _PLAIN or _is_chosen_elsewhere() else _product(input, weight)
    grad = torch.is_grad_enabled()
    if product is None or (grad and (weight.requires_grad or (bias is not None and bias.requires_grad))):
        return functional.linear(input, weight, bias)
    if not grad or not input.requires_grad:
        return product(input, weight, bias)
    out: Tensor = _Linear.apply(product, input, weight, bias)
    return out


def _is_chosen_elsewhere() -> bool:
    """Whether a compiler, or autocast, which has dtypes of its own, chooses products."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


def _int8_forward(layer: torch.nn.Linear, values: Tensor, scale: Tensor, input: Tensor) -> Tensor:
    differentiated = torch.is_grad_enabled() and input.requires_grad
    if differentiated or _is_chosen_elsewhere() or not native_linear.fits(input, values):
        return functional.linear(input, layer.weight, layer.bias)
    return native_linear.linear(input, values, layer.bias, scale=scale)


class _Linear(torch.autograd.Function):
    """input @ weight^T + bias, differentiable in the input alone."""

    @staticmethod
    def forward(ctx: Any, product: Product, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return None, _backward(grad, weight), None, None


def _backward(grad: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # for a second derivative, which those below do not have
        return functional.linear(grad, weight.t())
    if native_linear.backward_fits(grad, weight):
        return native_linear.backward(grad, weight)
    return (_product(grad, weight.t()) or functional.linear)(grad, weight.t(), None)


def _product(input: Tensor, weight: Tensor) -> Product | None:
    """What multiplies rows (..., K) with a weight (N, K) faster than PyTorch would."""
    if native_linear.fits(input, weight):
        return native_linear.linear
    usual = input.dtype == weight.dtype == torch.float32 and input.is_cpu and weight.is_cpu
    return _onednn if usual and input.numel() > 0 and _mkl_is_slow() and torch.backends.mkldnn.enabled else None


def _onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    # Not a view, as far as autograd knows: a model may go on in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, [*input.shape[:-1], weight.shape[0]])
    return shaped


@functools.cache
def _mkl_is_slow() -> bool:
    # The operator is inductor's, and no part of PyTorch's documented interface.
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return native_linear.is_amd() and has_operator and torch.backends.mkl.is_available()
