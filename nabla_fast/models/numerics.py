"""Comparisons of results up to rounding, and of a gradient with a finite difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of two numbers that mean the same: the largest accepted |a - b| / |b| of a row, by the bits of the dtype.
_CLOSE = {64: 1e-4, 32: 1e-3, 16: 0.1}
# Finite differences: steps tried, in units of the embeddings' norms, until the curvature no longer matters, and the
# accepted relative error.
_STEPS = {64: (1e-3, 1e-4, 1e-5, 1e-6), 32: (2e-3, 5e-4, 1e-4, 1e-2), 16: (0.2, 0.05, 0.02, 0.005, 0.002)}
_SLOPE_ERROR = {64: 1e-2, 32: 0.05, 16: 0.5}
# What layers compute in where that is less than the dtype of their inputs, as quantised ones may.
_COMPUTED_IN: ContextVar[torch.dtype | None] = ContextVar("computed_in", default=None)


@contextmanager
def computed_in(dtype: torch.dtype | None) -> Iterator[None]:
    """In this block, results are compared as those of arithmetic in ``dtype``, if their own is not narrower."""
    token = _COMPUTED_IN.set(dtype)
    try:
        yield
    finally:
        _COMPUTED_IN.reset(token)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest |a - b| / |b| of the rows, the median in half precision, where a few rows may be routed otherwise."""
    a, b = ours.detach().double(), theirs.detach().to(ours.device).double()
    same = (a == b) | (a.isnan() & b.isnan())
    errors = torch.where(same, 0.0, a - b).norm(dim=-1) / b.nan_to_num(0).norm(dim=-1).clamp(min=1e-300)
    errors = errors.nan_to_num(torch.inf)
    return float(errors.median() if bits_of(ours, theirs) == 16 else errors.max())


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results (n, k) of the same meaning differ by no more than rounding."""
    return relative_error(ours, theirs) <= _CLOSE[bits_of(ours, theirs)]


@dataclass(frozen=True)
class Slope:
    """The gradient (n, d) of a function of x (n, d), None if it has none; and layers that pass none on."""

    value: float
    gradient: Tensor | None
    cut: tuple[str, ...]


def slope(function: Callable[[Tensor], Tensor], x: Tensor, model: Any = None) -> Slope:
    """The gradient of ``function``, from x (n, d) to one number; ``model`` is searched for layers that cut it off."""
    with torch.enable_grad(), _cuts(model) as cut:
        at = x.detach().requires_grad_()
        value = function(at)
        gradient = torch.autograd.grad(value, at, allow_unused=True)[0] if value.requires_grad else None
    return Slope(float(value.detach()), gradient, tuple(cut))


def gradient_fault(
    function: Callable[[Tensor], Tensor], x: Tensor, model: Any = None, found: Slope | None = None
) -> str | None:
    """Compares the gradient of ``function``, from x (n, d) to one number, with a finite difference.

    The direction is half the gradient's and half a random one: along the first, a finite difference stands out from
    rounding; along the second, what the gradient has left out shows.

    Args:
        found: the gradient, where it is known already.

    Returns:
        What is wrong, None if nothing is.
    """
    bits = bits_of(x)
    found = found or slope(function, x, model)
    if found.gradient is None:
        return "it gives no gradient" + _at_layer(found.cut)
    if not math.isfinite(found.value) or not bool(found.gradient.isfinite().all()):
        return None
    if bits == 16 and found.cut:
        return "it gives only a part of its gradient" + _at_layer(found.cut)
    # Each row moves in proportion to its own size: a row of zeros is followed by the steepest of functions.
    sizes = x.double().norm(dim=-1, keepdim=True)
    gradient = found.gradient.double()
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
    uphill = sizes * gradient
    direction = sizes * (random / random.norm() + uphill / uphill.norm().clamp(min=1e-300))
    # Rounding of the two values.
    noise = 100 * torch.finfo(_narrowest(x)).eps * (abs(found.value) + 0.01 * float(uphill.norm()))
    tried = ""
    for step in _STEPS[bits]:
        with torch.no_grad():
            ends = [(x.double() + sign * step * direction).to(x.dtype) for sign in (1, -1)]
            measured = float(function(ends[0]).double() - function(ends[1]).double())
        # The step as rounding has left it.
        predicted = float((gradient * (ends[0].double() - ends[1].double())).sum())
        if abs(measured - predicted) <= _SLOPE_ERROR[bits] * abs(predicted) + noise:
            return None
        tried = f"{measured:.3g} by a finite difference, {predicted:.3g} by the gradient"
    return f"its gradient is not that of its forward pass (a change of {tried})" + _at_layer(found.cut)


@contextmanager
def _cuts(model: Any) -> Iterator[list[str]]:
    """Names of layers with weights that are called in this block with a gradient and answer without one."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules() if model is not None else ():
        weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        # What an indexer computes chooses keys; it has no gradient in training either.
        if not any(w.ndim > 1 for w in weights) or "indexer" in name.lower():
            continue

        def look(_module: Any, arguments: Any, output: Any, name: str = name) -> None:
            asks = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
            answers = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
            floats = [x for x in answers if x.is_floating_point()]
            if asks and floats and not any(x.requires_grad for x in floats):
                found.append(name)

        handles.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _at_layer(cut: tuple[str, ...]) -> str:
    return f"; its layer {cut[0]} passes none on" if cut else ""


def _narrowest(*tensors: Tensor) -> torch.dtype:
    inside = _COMPUTED_IN.get()
    dtypes = [x.dtype for x in tensors] + ([] if inside is None else [inside])
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)


def bits_of(*tensors: Tensor) -> int:
    """How exact results are: 64, 32 or 16 bits."""
    return max(torch.finfo(_narrowest(*tensors)).bits, 16)
