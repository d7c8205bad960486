"""Faster kernels for a model's layers where PyTorch's default choice is slow.

* Linear layers on a CPU. A product of few rows, of which a decoded token is made, is a native kernel's
  (`nabla_fast.ops.linear`). Larger ones of float32 models are oneDNN's on AMD processors: PyTorch multiplies float32
  matrices by MKL, which there reaches less than half of what oneDNN does, and oneDNN comes with PyTorch too.
* Attention on a GPU. PyTorch prefers cuDNN's, for which the host makes a plan for every new length of a sequence; here
  nearly every call has lengths of its own.
* Norms and rotary embeddings on a GPU, see `nabla_fast.models.fused_layers`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nabla_fast.models.fused_layers import FusedLayers
from nabla_fast.ops import linear as few_rows


def fast_kernels(device: torch.device, *fused: FusedLayers) -> AbstractContextManager[Any]:
    """In this block, layers of models on ``device`` use the kernels that this module describes.

    The models stay as they are, and results differ by rounding. On a CPU it is a mode of this thread, for weights that
    want no gradient; on a GPU it changes settings of the whole process and layers of the models, which are put back
    when the last block ends.

    Args:
        fused: the layers of each model that are exchanged.
    """
    if device.type == "cuda":
        return _on_gpu(fused)
    return _LinearLayers() if device.type == "cpu" else nullcontext()


@contextmanager
def _on_gpu(fused: tuple[FusedLayers, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_without_cudnn_attention())
        for layers in fused:
            stack.enter_context(layers.active())
        yield


class _Blocks:
    """The number of active blocks in all threads, and the setting before the first."""

    lock = threading.Lock()
    count = 0
    before = True


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    switch = torch.backends.cuda
    with _Blocks.lock:
        if _Blocks.count == 0:
            _Blocks.before = switch.cudnn_sdp_enabled()
            switch.enable_cudnn_sdp(False)
        _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= 1
            if _Blocks.count == 0:
                switch.enable_cudnn_sdp(_Blocks.before)


@functools.cache
def _mkl_is_slow() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    # The operator is inductor's, and no part of PyTorch's documented interface.
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and has_operator and torch.backends.mkl.is_available()


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _LinearLayers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # as in torch.nn.functional
    product = _product(input, weight)
    recorded = torch.is_grad_enabled()
    frozen = not recorded or not (weight.requires_grad or (bias is not None and bias.requires_grad))
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if product is None or not frozen or not plain:
        return linear(input, weight, bias)
    if not recorded or not input.requires_grad:
        return _shaped(product, input, weight, bias)
    out: Tensor = _Linear.apply(product, input, weight, bias)
    return out


class _Linear(torch.autograd.Function):
    """input @ weight^T + bias, differentiable in the input alone."""

    @staticmethod
    def forward(ctx: Any, product: Product, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _shaped(product, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        transposed = weight.t()
        return None, _shaped(_product(grad, transposed) or linear, grad, transposed, None), None, None


def _shaped(product: Product, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = product(rows.reshape(-1, rows.shape[-1]), weight, bias)
    # Not a view, as far as autograd knows: a model may go on in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, [*rows.shape[:-1], weight.shape[0]])
    return shaped


def _product(input: Tensor, weight: Tensor) -> Product | None:
    """What multiplies rows (M, K) with a weight (N, K) faster than PyTorch would."""
    if few_rows.fits(input, weight):
        return few_rows.linear
    usual = input.dtype == weight.dtype == torch.float32 and input.device.type == weight.device.type == "cpu"
    return _onednn if usual and input.numel() > 0 and _mkl_is_slow() and torch.backends.mkldnn.enabled else None


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out
