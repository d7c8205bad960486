"""Layers of a model as one kernel each, where transformers writes them as several operators; on a CPU, linear layers.

Two kinds are most of what a GPU's host launches for a gradient: RMS norms (8 operators forward and 14 backward, now one
each by PyTorch's own kernels) and rotary embeddings (10 and about as many, now one each by a kernel of ours). The model
stays as it is: layers are exchanged for the length of a block. A layer is only exchanged if, tried on random numbers,
the kernel gives what the layer gives, and the same gradient.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_fast.models import checks, linear_layers, quantised_layers
from nabla_fast.models.numerics import relative_error
from nabla_fast.models.quantised_layers import is_plain
from nabla_fast.models.temporary import frozen, set_attribute, while_any
from nabla_fast.ops.rotary import rotary

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROTARY = "apply_rotary_pos_emb"
# The largest relative error that rounding makes, by bits.
_CLOSE = {64: 1e-6, 32: 1e-4, 16: 0.03}


@dataclass(frozen=True)
class FusedLayers:
    """What can be exchanged in one model.

    Attributes:
        norms: modules, and the forward passes that take the place of theirs.
        rotary: Python modules whose attention layers call ``apply_rotary_pos_emb`` by that name, and what takes its
            place.
        linear: layers whose forward passes `nabla_fast.models.linear_layers` has.
        quantised: layers that `nabla_fast.models.quantised_layers` makes exact.
    """

    norms: tuple[tuple[torch.nn.Module, Callable[..., Any]], ...] = ()
    rotary: tuple[tuple[ModuleType, Callable[..., Any]], ...] = ()
    linear: tuple[torch.nn.Linear, ...] = ()
    quantised: tuple[Any, ...] = ()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchanges them in this block, for all threads."""
        norms, functions = dict(self.norms), dict(self.rotary)
        with (
            while_any("norm", norms, lambda module: set_attribute(module, "forward", norms[module])),
            while_any("rotary", functions, lambda page: set_attribute(page, _ROTARY, functions[page])),
            while_any("linear", self.linear, linear_layers.exchange),
            while_any("quantised", self.quantised, quantised_layers.exchange),
        ):
            yield


@contextmanager
def fast_kernels(device: torch.device, *fused: FusedLayers) -> Iterator[None]:
    """In this block, layers of models on ``device`` use the kernels that this module describes.

    Attention on a GPU is not cuDNN's, which PyTorch prefers: for that, the host makes a plan for every new length of a
    sequence, and here nearly every call has lengths of its own.

    Results differ by rounding. Layers and, on a GPU, settings of the whole process are put back when the last block
    ends.

    Args:
        fused: the layers of each model that are exchanged.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(while_any("cudnn", [torch.backends.cuda], _without_cudnn_attention))
        for layers in fused:
            stack.enter_context(layers.active())
        yield


def _without_cudnn_attention(switch: Any) -> Callable[[], Any]:
    back = partial(switch.enable_cudnn_sdp, switch.cudnn_sdp_enabled())
    switch.enable_cudnn_sdp(False)
    return back


def fused_layers(model: Any, name: str) -> FusedLayers:
    """What can be exchanged in ``model``; on a GPU, found by trying, once per model."""
    device = model.get_input_embeddings().weight.device.type
    if device != "cuda":
        linear = linear_layers.find(model) if device == "cpu" else ()
        return FusedLayers(linear=linear, quantised=quantised_layers.find_inexact(model))
    found: FusedLayers = checks.remembered(model, name, "fused layers", lambda: find(model))
    return found


def find(model: Any) -> FusedLayers:
    """Tries the layers of a model: one of each class, size and setting stands for the others."""
    # What is quantised or off-loaded says nothing of the numbers that layers compute with.
    quantised = quantised_layers.find_inexact(model)
    like_model = next((x for x in model.parameters() if is_plain(x) and not x.is_meta), None)
    if like_model is None:
        return FusedLayers(quantised=quantised)
    tried: dict[Any, bool | None] = {}
    norms = []
    for module in model.modules():
        if not _may_be_rms_norm(module):
            continue
        weight: Any = getattr(module, "weight", None)
        settings = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
        like = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)
        key = (type(module), like, repr(settings))
        if key not in tried:
            tried[key] = _offset_of_norm(module, like_model)
        offset = tried[key]
        if offset is not None:
            norms.append((module, _Norm(module, offset)))
    classes = {type(module).__module__ for module in model.modules() if "Attention" in type(module).__name__}
    pages = [sys.modules[page] for page in sorted(classes) if callable(getattr(sys.modules.get(page), _ROTARY, None))]
    functions = [
        (page, partial(_rotated, getattr(page, _ROTARY)))
        for page in pages
        if _is_rotary(getattr(page, _ROTARY), like_model)
    ]
    return FusedLayers(tuple(norms), tuple(functions), quantised=quantised)


class _Norm:
    """The forward pass of an RMS norm by one kernel: ``x / rms(x)`` times nothing, the weight, or (``offset``) one more
    than the weight; by its own where it is called in a way that was not tried."""

    def __init__(self, module: Any, offset: bool) -> None:
        self.module, self.own, self.offset = module, module.forward, offset
        self.epsilon = _epsilon(module)
        self.made: tuple[tuple[Any, ...], Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.own(*args, **kwargs)
        (x,) = args
        weight = getattr(self.module, "weight", None)
        if weight is not None:
            asks = weight.requires_grad and torch.is_grad_enabled()
            if asks or x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
                return self.own(x)
        width = x.shape[-1:]
        if not self.offset or weight is None:
            return functional.rms_norm(x, width, weight, self.epsilon)
        # In float32, as such models do: in bfloat16, one and a small weight are one.
        scale = self._one_more(weight)
        return functional.rms_norm(x.to(scale.dtype), width, scale, self.epsilon).to(x.dtype)

    def _one_more(self, weight: Tensor) -> Tensor:
        """One more than the weight, made anew when that has changed."""
        if torch.compiler.is_compiling():
            return 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        state = weight.data_ptr(), weight._version, weight.dtype, weight.device
        if self.made is None or self.made[0] != state:
            self.made = state, 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return self.made[1]


def _may_be_rms_norm(module: Any) -> bool:
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    leaf = next(module.children(), None) is None and not isinstance(module, torch.nn.RMSNorm)
    plain = parameters in ([], ["weight"]) and (not parameters or module.weight.ndim == 1)
    # Another library (accelerate, for one) may have set its forward itself.
    own = "forward" not in vars(module)
    named = "Norm" in type(module).__name__ and _epsilon(module) is not None
    return leaf and plain and own and named


def _epsilon(module: Any) -> float | None:
    values = (getattr(module, name, None) for name in _EPSILONS)
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _offset_of_norm(module: Any, like: Tensor) -> bool | None:
    """How `_Norm` computes what a module does; None if it does not."""
    weight = getattr(module, "weight", None)
    like = like if weight is None else weight
    if not is_plain(like) or like.is_meta:
        return None
    x = _random((2, 3, 64 if weight is None else len(weight)), like, 0)
    with frozen([] if weight is None else [weight]):
        for offset in (False,) if weight is None else (False, True):
            # The smallest shows the epsilon.
            if all(_same(module.forward, _Norm(module, offset), [size * x]) for size in (1.0, 1e-3, 30.0)):
                return offset
    return None


def _rotated(own: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    """``apply_rotary_pos_emb`` by one kernel; by ``own`` where it is called in a way that was not tried."""
    fits = (
        not args
        and kwargs.get("unsqueeze_dim", 1) == 1
        and len(kwargs) == ("unsqueeze_dim" in kwargs)
        and all(isinstance(x, Tensor) for x in (q, k, cos, sin))
        and q.ndim == k.ndim == 4
        and cos.ndim == 3
        and cos.shape == sin.shape
        and cos.shape[1:] == (q.shape[2], q.shape[3]) == (k.shape[2], k.shape[3])
        and cos.shape[0] in (1, q.shape[0])
        and q.shape[0] == k.shape[0]
        and q.shape[3] % 2 == 0
        and q.dtype == k.dtype == cos.dtype == sin.dtype != torch.float64
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    )
    return rotary(q, k, cos, sin) if fits else own(q, k, cos, sin, *args, **kwargs)


def _is_rotary(function: Callable[..., Any], like: Tensor) -> bool:
    try:
        names = list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return False
    if names[:4] != ["q", "k", "cos", "sin"] or like.dtype == torch.float64:
        return False
    cos, sin = (_random((2, 3, 8), like, seed) for seed in (2, 3))
    q, k = _random((2, 4, 3, 8), like, 0), _random((2, 2, 3, 8), like, 1)
    return _same(lambda q, k: function(q, k, cos, sin), lambda q, k: _rotated(function, q, k, cos, sin), [q, k])


def _random(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=generator).to(like.device, dtype)


def _same(theirs: Callable[..., Any], ours: Callable[..., Any], inputs: list[Tensor]) -> bool:
    """Whether two functions of tensors give the same, and the same gradients, but for rounding."""
    results = []
    with torch.enable_grad():
        for function in (theirs, ours):
            given = [x.detach().requires_grad_() for x in inputs]
            try:
                out = function(*given)
            except Exception:  # whatever a layer that is not of this kind raises
                return False
            out = list(out) if isinstance(out, (tuple, list)) else [out]
            if not all(isinstance(x, Tensor) and x.requires_grad for x in out):
                return False
            weighed = sum((x * _random(tuple(x.shape), x, 7)).sum() for x in out)
            results.append([x.detach() for x in out] + list(torch.autograd.grad(weighed, given)))
    mine, own = results
    return len(mine) == len(own) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and relative_error(a.flatten(0, -2), b.flatten(0, -2)) <= _CLOSE[torch.finfo(a.dtype).bits]
        for a, b in zip(own, mine, strict=True)
    )
