"""Decoder layers on a CPU as one native call each, in a batch that is being decoded; for drafts, with weights of 8 bits.

A token of a small model waits for what is between its layers' modules about as long as for a quarter of their weights.
Drafts read that quarter: the same layers with weights rounded to 8 bits, row by row, behind the same keys and values.
They foresee nearly all tokens; what they foresee is verified with the weights as they are.

Layers whose modules `nabla_fast.models.token_modules` computes are tried on random numbers as a whole; a call that was
not tried, or a layer that is no longer as it was, goes the layer's own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nabla_fast.models import token_layers
from nabla_fast.models.growing_cache import GrowingCache, GrowingLayer
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.layer_trials import random_like, refuse, same
from nabla_fast.models.temporary import own_attribute, while_any
from nabla_fast.models.token_modules import CACHE_NAMES, IGNORED, Attention, Forward, GatedMLP, Parts, are_tables
from nabla_fast.ops import linear as native_linear
from nabla_fast.ops.token_layers import DecoderLayer, decoder_layer

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MODULES = ("self_attn", "mlp")
_COUNT_OF_NORMS = 4
# Arguments that are read, or mean nothing where those are.
_KNOWN = {"position_embeddings", "attention_mask", *CACHE_NAMES, *IGNORED}


class NativeLayer:
    """The forward pass of ``y + mlp(norm(y))``, ``y = x + self_attn(norm(x))``."""

    def __init__(
        self, module: Any, own: Forward, attention: Attention, mlp: GatedMLP, norms: Mapping[Any, Any]
    ) -> None:
        self.own, self.attention, self.mlp = own, attention.module, mlp
        outer = [norms[module._modules[name]] for name in _NORMS]
        self.parts = Parts(module, norms=_NORMS, bypassed=_MODULES, inner=(attention.parts, mlp.parts))
        self._settings = {
            "scaling": attention.module.scaling,
            "epsilon": outer[0].epsilon or 0.0,
            "offset": outer[0].offset,
            "head_epsilon": attention.epsilon,
            "head_offset": attention.offset,
            "activation": mlp.activation,
        }
        # The layer with weights of 8 bits; where its weights were, and their versions.
        self._rough: tuple[list[tuple[int, int]], DecoderLayer] | None = None

    def __call__(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in CACHE_NAMES if name in kwargs]
        cache = kwargs[names[0]] if len(names) == 1 else None
        if type(cache) is not GrowingCache or args or not isinstance(hidden_states, Tensor):
            return self.own(hidden_states, *args, **kwargs)
        layer = cache.layers[self.attention.layer_idx]
        if not self._fits(hidden_states, cache, layer, kwargs):
            return self.own(hidden_states, *args, **kwargs)
        if cache.rough and layer.rough is None:
            layer.rough = self._rounded(layer.exact)
        size = hidden_states.shape[1]
        past = layer.reserve(size)
        tables, mask = kwargs["position_embeddings"], kwargs["attention_mask"]
        weights = layer.rough if cache.rough else layer.exact
        out = decoder_layer(hidden_states, weights, *tables, mask, *layer.buffers, past)
        layer.use(past + size)
        return out

    def _fits(self, x: Tensor, cache: GrowingCache, layer: GrowingLayer, given: Mapping[str, Any]) -> bool:
        # Every layer of a pass is asked the same, and asking takes as long as some of what it computes.
        call = given.get("position_embeddings"), given.get("attention_mask", ...), layer.get_seq_length(), x.shape
        last = cache.last_call
        if last is None or last[0] is not call[0] or last[1] is not call[1] or last[2:] != call[2:]:
            if not _is_known(x, call[0], call[1], call[2], given):
                return False
            cache.last_call = call
        # Once for a batch that is decoded.
        if layer.exact is None:
            layer.exact = self._weights(x) or False
        return layer.exact is not False

    def _weights(self, x: Tensor) -> DecoderLayer | None:
        """The layer's weights, if it is as it was when it was tried, and they are for rows like ``x``."""
        attention = self.attention
        if not (
            _is_exchanged()
            and attention.config._attn_implementation == token_layers.ATTENTION
            and attention.scaling == self._settings["scaling"]
            and not attention.training
            and self.parts.fit(x[:1, :1])
        ):
            return None
        own = [part._parameters for part in self.parts.linears]
        weights, biases = [part["weight"] for part in own], [part["bias"] for part in own]
        norms = [part._parameters["weight"] for part in self.parts.norms]
        norms += [None] * (_COUNT_OF_NORMS - len(norms))
        return DecoderLayer(weights, [None] * len(weights), biases, norms, **self._settings)

    def _rounded(self, exact: DecoderLayer) -> DecoderLayer:
        """The layer with weights of 8 bits, rounded anew when they have changed."""
        state = [(weight.data_ptr(), weight._version) for weight in exact.weights]
        if self._rough is None or self._rough[0] != state:
            rounded = [native_linear.rounded(weight) for weight in exact.weights]
            values, scales = [x for x, _ in rounded], [x for _, x in rounded]
            self._rough = state, replace(exact, weights=values, scales=scales)
        return self._rough[1]


def _is_known(x: Tensor, tables: Any, mask: Any, past: int, given: Mapping[str, Any]) -> bool:
    """Whether a call of a decoder layer is one that the kernel has."""
    return (
        x.ndim == 3
        and 0 < x.numel() <= token_layers.MOST_TOKENS * x.shape[-1]
        and token_layers.is_for_kernels(x)
        and are_tables(tables, x)
        and all(name in _KNOWN or value is None or value is False for name, value in given.items())
        and _is_mask(mask, x, past)
    )


def _is_mask(mask: Any, x: Tensor, past: int) -> bool:
    batch, size, _ = x.shape
    if mask is None:
        return size == 1  # several queries without a mask are causal
    return (
        isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, size)
        and mask.shape[3] == past + size
    )


def _is_exchanged() -> bool:
    """Whether "sdpa" is `token_layers.attention` for now, and nobody else's function."""
    function = ALL_ATTENTION_FUNCTIONS[token_layers.ATTENTION]
    return getattr(function, "func", None) is token_layers.attention


def find(
    model: Any, norms: Mapping[Any, Any], modules: Iterable[tuple[Any, Forward]]
) -> tuple[tuple[Any, NativeLayer], ...]:
    """The decoder layers of a model that are a native call, with the forward pass that takes the place of theirs.

    Args:
        norms: what `nabla_fast.models.token_layers` computes.
        modules: what `nabla_fast.models.token_modules` found.
    """
    inner = dict(modules)
    found = []
    for module in model.modules():
        if set(module._modules) != {*_NORMS, *_MODULES} or own_attribute(module, "forward") is not None:
            continue
        attention, mlp = (inner.get(module._modules[name]) for name in _MODULES)
        outer = [norms.get(module._modules[name]) for name in _NORMS]
        known = isinstance(attention, Attention) and isinstance(mlp, GatedMLP) and None not in outer
        if known and _is_same(module, attention, mlp, norms):
            found.append((module, NativeLayer(module, module.forward, attention, mlp, norms)))
    return tuple(found)


def _is_same(module: Any, attention: Attention, mlp: GatedMLP, norms: Mapping[Any, Any]) -> bool:
    """Of three tokens behind four others, one of which is masked; in one row of two, another."""
    names = list(inspect.signature(module.forward).parameters)
    argument = next((name for name in CACHE_NAMES if name in names), None)
    settings = {(norms[module._modules[name]].epsilon, norms[module._modules[name]].offset) for name in _NORMS}
    if names[:1] != ["hidden_states"] or argument is None or len(settings) > 1:
        return False
    projection, size, index = module.self_attn.k_proj, module.self_attn.head_dim, module.self_attn.layer_idx
    weight = projection.weight
    batch, past, new = 2, 4, 3
    heads = max(1, len(weight) // size)
    before = [random_like(weight, (batch, heads, past, size), seed) for seed in (1, 2)]
    tables = tuple(random_like(weight, (1, new, size), seed) for seed in (3, 4))
    mask = torch.ones(batch, 1, new, past + new, dtype=torch.bool).tril(past)
    mask[0, ..., 1] = mask[1, ..., 0] = False
    layer = NativeLayer(module, refuse, attention, mlp, norms)

    def ours(*args: Any, **given: Any) -> Any:
        with while_any("attention", [ALL_ATTENTION_FUNCTIONS], token_layers.exchange_attention):
            return layer(*args, **given)

    def run(forward: Forward) -> Callable[..., list[Tensor]]:
        def outputs(x: Tensor) -> list[Tensor]:
            rows = [[part[row : row + 1] for part in before] for row in range(batch)]
            cache = GrowingCache([KVCache((k,) * (index + 1), (v,) * (index + 1), k[0, 0]) for k, v in rows], past)
            given = {"position_embeddings": tables, "attention_mask": mask, argument: cache, "use_cache": True}
            out = forward(x, **given)
            if not isinstance(out, Tensor):
                raise NotImplementedError("more than hidden states")
            kept = cache.layers[index]
            return [out, kept.keys, kept.values]

        return outputs

    x = random_like(weight, (batch, new, projection.in_features), 0)
    return same(run(module.forward), run(ours), [x], gradient=False)
