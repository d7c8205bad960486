"""Layers of a model on a CPU, by `nabla_fast.ops.token_layers`.

RMS norms and rotary embeddings are exchanged where, tried on random numbers, a kernel gives what the layer gives;
attention in transformers' table of implementations, in which "sdpa" means `scaled_dot_product_attention` whatever the
model. A call that the kernels do not have is the layer's own.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.layer_trials import epsilon_of, fits_rotary, random_like, refuse, same
from nabla_fast.ops import token_layers

# Tokens up to which the kernel of attention is faster than PyTorch's, which shares keys among queries.
MOST_TOKENS = 16
# Likewise with a gradient, in half precision.
_MOST_HALF_QUERIES = 128
ATTENTION = "sdpa"
# What transformers' own function of that name does something with.
_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias", "kwargs")
}
# Keyword arguments that other functions of the table read. Where one is given, transformers' own decides about it.
_OTHERS = ("softcap", "position_bias", "s_aux", "output_attentions")


class Norm:
    """The forward pass of an RMS norm; see `nabla_fast.models.gpu_layers.Norm`."""

    def __init__(self, module: Any, own: Callable[..., Any], offset: bool) -> None:
        self.module, self.own, self.offset = module, own, offset
        self.epsilon = epsilon_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        weight = getattr(self.module, "weight", None)
        if (
            not isinstance(x, Tensor)
            or not is_for_kernels(x, differentiable=True)
            or (weight is not None and not (weight.dtype is x.dtype and weight.shape == x.shape[-1:] and weight.is_cpu))
            or (weight is not None and weight.requires_grad and torch.is_grad_enabled())
        ):
            return self.own(*args, **kwargs)
        return token_layers.rms_norm(x, weight, self.epsilon or 0.0, self.offset)


def rotated(own: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    """``apply_rotary_pos_emb``."""
    if not fits_rotary(q, k, cos, sin, args, kwargs) or not is_for_kernels(q, differentiable=True):
        return own(q, k, cos, sin, *args, **kwargs)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return own(q, k, cos, sin)
    return token_layers.rotary(q, k, cos, sin)


def attention(
    own: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Any:
    """``sdpa_attention_forward`` of transformers."""
    differentiated = torch.is_grad_enabled()
    fits = (
        isinstance(query, Tensor)
        and is_for_kernels(query, differentiable=True)
        and (_is_for_blocks(query, value) if differentiated else query.shape[0] * query.shape[2] <= MOST_TOKENS)
        and not dropout
        and query.dtype is key.dtype is value.dtype
        # Without a mask, several queries are causal unless the module says otherwise.
        and (attention_mask.dtype is torch.bool if attention_mask is not None else query.shape[2] == 1)
        and (attention_mask is None or _is_broadcast(attention_mask, query, key))
        and query.shape[1] == key.shape[1] * getattr(module, "num_key_value_groups", 1)
        and query.shape[0] == key.shape[0]
        and not any(kwargs.get(name) is not None for name in _OTHERS)
    )
    if not fits:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return own(module, query, key, value, attention_mask, **options)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    kernel = token_layers.attention_with_gradient if differentiated else token_layers.attention
    return kernel(query, key, value, attention_mask, scale), None


def _is_for_blocks(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel with a gradient has these heads, and is faster than PyTorch's, which multiplies tiles of
    bfloat16 where the processor has them."""
    return (
        token_layers.fast_with_gradient()
        and (query.dtype is torch.float32 or query.shape[2] <= _MOST_HALF_QUERIES)
        and query.shape[-1] % token_layers.HEAD_UNIT == value.shape[-1] % token_layers.HEAD_UNIT == 0
    )


def exchange_attention(table: Any) -> Callable[[], Any] | None:
    """Makes `attention` the meaning of "sdpa" in transformers' table; returns what puts back its own.

    None where that is not what is known.
    """
    own = table[ATTENTION]
    if ATTENTION in table._local_mapping or not is_known(own):
        return None

    def back() -> None:
        del table[ATTENTION]

    table[ATTENTION] = functools.partial(attention, own)
    return back


@functools.cache
def is_known(own: Any) -> bool:
    """Whether a function has arguments that `attention` knows, and gives on random numbers what the kernel gives."""
    try:
        known = set(inspect.signature(own).parameters) <= _ARGUMENTS
    except (ValueError, TypeError):
        known = False
    if not known:
        return False
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    like, size = torch.ones(1), token_layers.HEAD_UNIT
    q, k, v = (random_like(like, (2, heads, length, size), heads) for heads, length in ((4, 3), (2, 7), (2, 7)))
    mask = random_like(like, (2, 1, 3, 7), 5) > 0
    mask[..., 0] = True

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v: function(module, q, k, v, mask, scaling=0.3)[0]

    ours = functools.partial(attention, refuse)
    gradients = (False, True) if token_layers.fast_with_gradient() else (False,)
    return all(same(run(own), run(ours), [q, k, v], gradient=gradient) for gradient in gradients)


def _is_broadcast(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    rows = zip(mask.shape, query.shape[:3], strict=False)
    return mask.ndim == 4 and mask.shape[3] == key.shape[2] and all(a in (1, b) for a, b in rows)


def is_for_kernels(x: Tensor, *, differentiable: bool = False) -> bool:
    """Whether a call with ``x`` may be a native kernel's: on a CPU, in a dtype of theirs, and not under autograd unless
    the kernel is differentiable."""
    return (
        x.is_cpu
        and x.dtype in token_layers.DTYPES
        and (differentiable or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
