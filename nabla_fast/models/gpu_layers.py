"""Layers of a model on a GPU as one kernel each, with a gradient: RMS norms and rotary embeddings.

They are most of what a GPU's host launches for a gradient: norms are 8 operators forward and 14 backward, and one each
by PyTorch's own kernels; rotary embeddings are 10 and about as many, and one each by a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_fast.models.layer_trials import epsilon_of, fits_rotary
from nabla_fast.ops.rotary import rotary


class Norm:
    """The forward pass of an RMS norm by one kernel: ``x / rms(x)`` times nothing, the weight, or (``offset``) one more
    than the weight; by its own where it is called in a way that was not tried."""

    def __init__(self, module: Any, own: Callable[..., Any], offset: bool) -> None:
        self.module, self.own, self.offset = module, own, offset
        self.epsilon = epsilon_of(module)
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


def rotated(own: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    """``apply_rotary_pos_emb`` by one kernel; by ``own`` where it is called in a way that was not tried."""
    if not fits_rotary(q, k, cos, sin, args, kwargs) or (
        torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    ):
        return own(q, k, cos, sin, *args, **kwargs)
    return rotary(q, k, cos, sin)
