"""Which layers of a model a kernel can take the place of, found by trying them on random numbers.

One layer of each class, size and setting stands for the others. A kernel goes back to a layer's own way for calls that
it does not have; in a trial it must not, or the layer would be compared with itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.numerics import relative_error
from nabla_fast.models.quantised_layers import is_plain
from nabla_fast.models.temporary import frozen

ROTARY = "apply_rotary_pos_emb"
# A module, its own forward pass, whether one is added to its weight → a forward pass for it.
NormKernel = Callable[[Any, Callable[..., Any], bool], Callable[..., Any]]
# A model's own function, and its arguments → what that returns.
RotaryKernel = Callable[..., Any]

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
# The largest relative error that rounding makes, by bits.
_CLOSE = {64: 1e-6, 32: 1e-4, 16: 0.06}


def numbers_like(model: Any) -> Tensor | None:
    """A parameter whose dtype and device say what layers compute with; None if there is none.

    What is quantised or off-loaded says nothing of that.
    """
    return next((x for x in model.parameters() if is_plain(x) and not x.is_meta), None)


def norms(
    model: Any, like: Tensor, kernel: NormKernel, *, gradient: bool = True
) -> tuple[tuple[torch.nn.Module, Callable[..., Any]], ...]:
    """The RMS norms of a model that ``kernel`` computes, with the forward pass that it made for each.

    Args:
        gradient: whether the kernel has one, which must be the norm's too.
    """
    tried: dict[Any, bool | None] = {}
    found = []
    for module in model.modules():
        if not _may_be_rms_norm(module):
            continue
        weight: Any = getattr(module, "weight", None)
        settings = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
        shape = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)
        key = (type(module), shape, repr(settings))
        if key not in tried:
            tried[key] = _offset_of_norm(module, like, kernel, gradient)
        offset = tried[key]
        if offset is not None:
            found.append((module, kernel(module, module.forward, offset)))
    return tuple(found)


def rotary_functions(
    model: Any, like: Tensor, kernel: RotaryKernel, *, gradient: bool = True
) -> tuple[tuple[ModuleType, Callable[..., Any]], ...]:
    """Python modules whose attention layers call ``apply_rotary_pos_emb`` by that name, and what takes its place."""
    classes = {type(module).__module__ for module in model.modules() if "Attention" in type(module).__name__}
    pages = [sys.modules[page] for page in sorted(classes) if callable(getattr(sys.modules.get(page), ROTARY, None))]
    return tuple(
        (page, partial(kernel, getattr(page, ROTARY)))
        for page in pages
        if is_rotary(getattr(page, ROTARY), like, kernel, gradient=gradient)
    )


def epsilon_of(module: Any) -> float | None:
    """What a norm adds to the mean square, by the name of its attribute."""
    values = (getattr(module, name, None) for name in _EPSILONS)
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def is_rotary(function: Callable[..., Any], like: Tensor, kernel: RotaryKernel, *, gradient: bool = True) -> bool:
    """Whether a function of queries, keys, cosines and sines does what ``kernel`` does."""
    try:
        names = list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return False
    if names[:4] != ["q", "k", "cos", "sin"] or like.dtype == torch.float64:
        return False
    cos, sin = (random_like(like, (2, 3, 8), seed) for seed in (2, 3))
    q, k = random_like(like, (2, 4, 3, 8), 0), random_like(like, (2, 2, 3, 8), 1)
    theirs, ours = (lambda q, k: function(q, k, cos, sin)), (lambda q, k: kernel(refuse, q, k, cos, sin))
    return same(theirs, ours, [q, k], gradient=gradient)


def fits_rotary(q: Any, k: Any, cos: Any, sin: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``apply_rotary_pos_emb`` is of the kind that `is_rotary` tries."""
    return (
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
    )


def refuse(*_: Any, **__: Any) -> Any:
    """In a trial, what a kernel goes back to."""
    raise NotImplementedError("the kernel does not have this call")


def random_like(like: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers, in float32 where ``like`` is of integers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=generator).to(like.device, dtype)


def same(theirs: Callable[..., Any], ours: Callable[..., Any], inputs: list[Tensor], *, gradient: bool = True) -> bool:
    """Whether two functions of tensors give the same, and the same gradients, but for rounding."""
    results = []
    with torch.set_grad_enabled(gradient), torch.autocast(inputs[0].device.type, enabled=False):
        for function in (theirs, ours):
            given = [x.detach().requires_grad_(gradient) for x in inputs]
            try:
                out = function(*given)
            except Exception:  # whatever a layer that is not of this kind raises
                return False
            out = list(out) if isinstance(out, (tuple, list)) else [out]
            if not all(isinstance(x, Tensor) and x.requires_grad is gradient for x in out):
                return False
            gradients: list[Tensor] = []
            if gradient:
                weighed = sum((x * random_like(x, tuple(x.shape), 7)).sum() for x in out)
                gradients = list(torch.autograd.grad(weighed, given))
            results.append([x.detach() for x in out] + gradients)
    mine, own = results
    return len(mine) == len(own) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and relative_error(a.flatten(0, -2), b.flatten(0, -2)) <= _CLOSE[torch.finfo(a.dtype).bits]
        for a, b in zip(own, mine, strict=True)
    )


def _may_be_rms_norm(module: Any) -> bool:
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    leaf = next(module.children(), None) is None and not isinstance(module, torch.nn.RMSNorm)
    plain = parameters in ([], ["weight"]) and (not parameters or module.weight.ndim == 1)
    # Another library (accelerate, for one) may have set its forward itself.
    own = "forward" not in vars(module)
    named = "Norm" in type(module).__name__ and epsilon_of(module) is not None
    return leaf and plain and own and named


def _offset_of_norm(module: Any, like: Tensor, kernel: NormKernel, gradient: bool) -> bool | None:
    """How ``kernel`` computes what a module does; None if it does not."""
    weight = getattr(module, "weight", None)
    like = like if weight is None else weight
    if not is_plain(like) or like.is_meta:
        return None
    x = random_like(like, (2, 3, 64 if weight is None else len(weight)), 0)
    with frozen([] if weight is None else [weight]):
        for offset in (False,) if weight is None else (False, True):
            # The smallest shows the epsilon.
            sizes = [size * x for size in (1.0, 1e-3, 30.0)]
            ours = kernel(module, refuse, offset)
            if all(same(module.forward, ours, [y], gradient=gradient) for y in sizes):
                return offset
    return None
