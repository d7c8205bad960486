"""Layers on a CPU, a native kernel each: not the method's operators, but what a token waits for.

PyTorch takes seven operators for an RMS norm, fourteen for a rotary embedding, and copies keys and values for queries
that share them; a token of a small model spends as long on that as on its products. A row's result is the same
bits whatever is beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nabla_fast.ops import native
from nabla_fast.ops.registry import Once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_rms_norm = native.define("native_rms_norm(Tensor x, Tensor? weight, float epsilon, bool offset) -> Tensor")
_rms_norm_backward = native.define(
    "native_rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float epsilon, bool offset) -> Tensor"
)
_rotary = native.define("native_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
_attention = native.define("native_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_attention_blocks = native.define(
    "native_attention_blocks(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)"
)
_attention_blocks_backward = native.define(
    "native_attention_blocks_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    "Tensor log_sums, float scale) -> (Tensor, Tensor, Tensor)"
)
_attention_inputs = native.define(
    "native_attention_inputs(Tensor x, Tensor query, Tensor? query_bias, Tensor key, Tensor? key_bias, Tensor value, "
    "Tensor? value_bias, Tensor? query_norm, Tensor? key_norm, Tensor cos, Tensor sin, float epsilon, bool offset) "
    "-> (Tensor, Tensor, Tensor)"
)
_gated_mlp = native.define(
    "native_gated_mlp(Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, str activation) -> Tensor"
)
_decoder_layers = native.define(
    "native_decoder_layers(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, Tensor?[] norms, "
    "Tensor cos, Tensor sin, Tensor? mask, Tensor(a!)[] keys, Tensor(b!)[] values, int past, float scaling, "
    "float epsilon, bool offset, float head_epsilon, bool head_offset, str activation) -> Tensor"
)

HEAD_UNIT = 16
"""What `attention_with_gradient` wants the features of a head to be a multiple of."""
Linear = tuple[Tensor, Tensor | None]
"""A weight (out, in) and its bias (out,), or None."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


def available() -> bool:
    """Whether the native library has the kernels."""
    return all(
        native.has(name)
        for name in (
            "rms_norm",
            "rms_norm_backward",
            "rotary",
            "attention",
            "attention_blocks",
            "attention_blocks_backward",
            "attention_inputs",
            "gated_mlp",
            "decoder_layers",
        )
    )


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32, rounded once.

    Differentiable once, in ``x`` alone.

    Args:
        x: (..., d) float32, bfloat16 or float16.
        weight: (d,) of the same dtype; None for ones.
        offset: takes one more than ``weight``.

    Returns:
        (..., d) of the dtype of ``x``, contiguous.
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = (_RMSNorm.apply if differentiated else _rms_norm)(x, weight, epsilon, offset)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float, offset: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = epsilon, offset
        out: Tensor = _rms_norm(x, weight, epsilon, offset)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        with torch.no_grad():
            gradient: Tensor = _rms_norm_backward(grad, x, weight, *ctx.settings)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = Once.apply("rms_norm", gradient, x, grad)
        return gradient, None, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`nabla_fast.ops.rotary.rotary`, computed in float32 and rounded once. Differentiable in q and k."""
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    rotated: tuple[Tensor, Tensor] = (_Rotary.apply if differentiated else _rotary)(q, k, cos, sin)
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated: tuple[Tensor, Tensor] = _rotary(q, k, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # Turned back, each half takes the other's sines.
        return *rotary(grad_q, grad_k, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, in float32, rounded once.

    Args:
        q: (B, heads, S, D) float32, bfloat16 or float16.
        k: (B, key heads, T, D) of the same dtype; the number of heads is a multiple of that of key heads.
        v: (B, key heads, T, E) of the same dtype.
        mask: bool (B or 1, heads or 1, S or 1, T), True where a query reads a column; None for everywhere. A query that
            reads none gets zeros.

    Returns:
        (B, S, heads, E), contiguous.
    """
    out: Tensor = _attention(q, k, v, mask, scale)
    return out


@functools.cache
def fast_with_gradient() -> bool:
    """Whether `attention_with_gradient` is faster than PyTorch's attention: with AVX512, where that was measured."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def attention_with_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`attention` of many queries, differentiable once in q, k and v; D and E are multiples of `HEAD_UNIT`."""
    out: Tensor = _Attention.apply(q, k, v, mask, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out: Tensor
        out, log_sums = _attention_blocks(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        with torch.no_grad():
            found = _attention_blocks_backward(grad, q, k, v, mask, out, log_sums, ctx.scale)
        if torch.is_grad_enabled():  # create_graph=True
            found = [Once.apply("attention", one, q, k, v, grad) for one in found]
        return *found, None, None


def attention_inputs(
    x: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    norms: tuple[Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    epsilon: float = 0.0,
    offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention layer: linear layers, `rms_norm` of each head, and `rotary`.

    Args:
        x: (B, S, d) float32, bfloat16 or float16.
        query, key, value: linear layers of the same dtype as `nabla_fast.ops.linear.linear` takes them, whose outputs
            are heads of D features.
        norms: weights (D,) of the norm of queries and of that of keys; None where there is none.
        cos, sin: (B or 1, S, D) of the same dtype.
        epsilon, offset: of the norms.

    Returns:
        (B, heads, S, D) each; views of (B, S, heads, D).
    """
    heads: tuple[Tensor, Tensor, Tensor] = _attention_inputs(x, *query, *key, *value, *norms, cos, sin, epsilon, offset)
    return heads


def gated_mlp(x: Tensor, gate: Linear, up: Linear, down: Linear, activation: str) -> Tensor:
    """down(activation(gate(x)) * up(x)), the product rounded once.

    Args:
        x: (..., d) float32, bfloat16 or float16.
        gate, up, down: linear layers of the same dtype as `nabla_fast.ops.linear.linear` takes them.
        activation: a key of `ACTIVATIONS`.

    Returns:
        (..., d_out), contiguous.
    """
    out: Tensor = _gated_mlp(x, *gate, *up, *down, activation)
    return out


@dataclass(frozen=True)
class DecoderLayers:
    """The weights of `decoder_layers`, each of which maps x to y + mlp(norm(y)) with y = x + attention(norm(x)).

    Attributes:
        weights: (out, in) of the linear layers, seven for each layer: query, key, value, output, gate, up and down.
            They have the dtype of the layers' input; or that is float32, and all of them are of int8.
        scales: (out,) of each weight that is int8; None for any other.
        biases: (out,), or None.
        norms: four for each layer: weights of the norms before attention and before the network, of queries, and of
            keys; None for ones, and of queries and keys where there is no norm.
        scaling: the factor of scores.
        epsilon, offset: of the first two norms; see `rms_norm`.
        head_epsilon, head_offset: of the others.
        activation: a key of `ACTIVATIONS`.
    """

    weights: Sequence[Tensor]
    scales: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    norms: Sequence[Tensor | None]
    scaling: float
    epsilon: float
    offset: bool
    head_epsilon: float
    head_offset: bool
    activation: str


def decoder_layers(
    x: Tensor,
    layers: DecoderLayers,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    past: int,
) -> Tensor:
    """Layers of a transformer with gated feed-forward networks, over S tokens behind ``past`` others.

    Args:
        x: (B, S, d) float32, bfloat16 or float16; B * S is at most 16.
        cos, sin: (B or 1, S, D) of the same dtype.
        mask: bool (B or 1, 1, S or 1, past + S), True where a query reads a column; None for everywhere.
        keys, values: (B, key heads, columns, D) of each layer and the same dtype, with room for ``past`` + S columns:
            those of the new tokens are written.
        past: tokens that have their keys and values already.

    Returns:
        (B, S, d), contiguous.
    """
    out: Tensor = _decoder_layers(
        x,
        layers.weights,
        layers.scales,
        layers.biases,
        layers.norms,
        cos,
        sin,
        mask,
        keys,
        values,
        past,
        layers.scaling,
        layers.epsilon,
        layers.offset,
        layers.head_epsilon,
        layers.head_offset,
        layers.activation,
    )
    return out


@torch.library.register_fake("nabla_fast::native_decoder_layers")
def _fake_decoder_layers(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("nabla_fast::native_attention_inputs")
def _fake_attention_inputs(
    x: Tensor, query: Tensor, query_bias: object, key: Tensor, key_bias: object, value: Tensor, *more: object
) -> tuple[Tensor, Tensor, Tensor]:
    *_, cos, _, _, _ = more
    assert isinstance(cos, Tensor)
    q, k, v = (
        x.new_empty(*x.shape[:2], len(w) // cos.shape[2], cos.shape[2]).transpose(1, 2) for w in (query, key, value)
    )
    return q, k, v


@torch.library.register_fake("nabla_fast::native_gated_mlp")
def _fake_gated_mlp(
    x: Tensor, gate: Tensor, gate_bias: object, up: Tensor, up_bias: object, down: Tensor, *_: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(down))


@torch.library.register_fake("nabla_fast::native_rms_norm")
def _fake_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("nabla_fast::native_rms_norm_backward")
def _fake_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float, offset: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("nabla_fast::native_rotary")
def _fake_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@torch.library.register_fake("nabla_fast::native_attention")
def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("nabla_fast::native_attention_blocks")
def _fake_attention_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _fake_attention(q, k, v, mask, scale), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("nabla_fast::native_attention_blocks_backward")
def _fake_attention_blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, size = q.shape
    return q.new_empty(batch, queries, heads, size).transpose(1, 2), k.new_empty(k.shape), v.new_empty(v.shape)
