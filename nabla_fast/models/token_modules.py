"""Whole modules of a model on a CPU where no gradient is asked for: attention and gated feed-forward networks.

For a token of a small model, PyTorch takes as long to get from one layer to the next as to read their weights. Here a
module is one native call, or three with attention and the KV cache between them. Each module is tried on random numbers
by itself; a call that was not tried, or a module that is no longer as it was, goes the module's own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nabla_fast.models.growing_cache import GrowingCache
from nabla_fast.models.kv_cache import PaddedCache
from nabla_fast.models.layer_trials import random_like, refuse, same
from nabla_fast.models.quantised_layers import is_plain
from nabla_fast.models.temporary import own_attribute
from nabla_fast.models.token_layers import ATTENTION, MOST_TOKENS, is_for_kernels
from nabla_fast.ops import linear as native_linear
from nabla_fast.ops import token_layers

Forward = Callable[..., Any]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_GATED = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "act_fn"
CACHE_NAMES = ("cache", "past_key_values")
# Caches whose `update` needs nothing but keys, values and the layer.
_CACHES = (type(None), DynamicCache, PaddedCache, GrowingCache)
# Keyword arguments of an attention module that mean nothing to "sdpa", whose mask says it all.
_IGNORED = {"position_ids", "use_cache", "cache_position"}


class GatedMLP:
    """The forward pass of ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, module: Any, own: Forward, activation: str) -> None:
        self.own, self.activation = own, activation
        self.parts = Parts(module, _GATED, bypassed=(_ACTIVATION,))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or not is_for_kernels(x) or not self.parts.fit(x):
            return self.own(*args, **kwargs)
        gate, up, down = self.parts.linears
        return token_layers.gated_mlp(x, _linear(gate), _linear(up), _linear(down), self.activation)


class Attention:
    """The forward pass of an attention module with rotary embeddings, by the model's "sdpa"."""

    def __init__(self, module: Any, own: Forward, norms: Mapping[Any, Any]) -> None:
        self.module, self.own = module, own
        self.parts = Parts(module, _PROJECTIONS, [name for name in _HEAD_NORMS if name in module._modules])
        of_heads = [norms[part] for part in self.parts.norms]
        self.epsilon = (of_heads[0].epsilon or 0.0) if of_heads else 0.0
        self.offset = bool(of_heads) and of_heads[0].offset

    def __call__(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        x, rest = hidden_states, dict(kwargs)
        tables, mask = rest.pop("position_embeddings", None), rest.pop("attention_mask", None)
        # By their own names, so that one that is None elsewhere does not count.
        caches = [rest.pop(name) for name in CACHE_NAMES if name in rest]
        fits = (
            isinstance(x, Tensor)
            and is_for_kernels(x)
            and x.ndim == 3
            and not args
            and len(caches) <= 1
            and all(type(cache) in _CACHES for cache in caches)
            and all(name in _IGNORED or value is None or value is False for name, value in rest.items())
            and _are_tables(tables, x)
            and self.module.config._attn_implementation == ATTENTION
            and not self.module.training
            and self.parts.fit(x)
        )
        if not fits:
            return self.own(hidden_states, *args, **kwargs)
        query, key, value, out = self.parts.linears
        norms = [part._parameters["weight"] for part in self.parts.norms] or (None, None)
        q, k, v = token_layers.attention_inputs(
            x,
            _linear(query),
            _linear(key),
            _linear(value),
            (norms[0], norms[1]),
            tables[0],
            tables[1],
            self.epsilon,
            self.offset,
        )
        if caches and caches[0] is not None:
            k, v = caches[0].update(k, v, self.module.layer_idx)
        read = ALL_ATTENTION_FUNCTIONS[ATTENTION]
        mixed, _ = read(self.module, q, k, v, mask, dropout=0.0, scaling=self.module.scaling)
        return native_linear.linear(mixed.reshape(*x.shape[:2], -1), *_linear(out)), None


class Parts:
    """The layers of a module, as they were when it was tried: those whose weights are read, and those that are not.

    Args:
        inner: those of modules in it.
    """

    def __init__(
        self,
        module: Any,
        linears: Iterable[str] = (),
        norms: Iterable[str] = (),
        bypassed: Iterable[str] = (),
        inner: Iterable[Parts] = (),
    ) -> None:
        named = {name: module._modules[name] for name in (*linears, *norms, *bypassed)}
        self.linears, self.norms = [named[name] for name in linears], [named[name] for name in norms]
        self._places = [(module._modules, name, part, type(part)) for name, part in named.items()]
        for parts in inner:
            self.linears += parts.linears
            self.norms += parts.norms
            self._places += parts._places

    def fit(self, x: Tensor) -> bool:
        """Whether the layers are the same, nobody waits for their results, and ``x`` is few rows of their dtype."""
        for place, name, part, kind in self._places:
            if place.get(name) is not part or type(part) is not kind or part._forward_hooks or part._forward_pre_hooks:
                return False
        weights = [part._parameters["weight"] for part in (*self.linears, *self.norms)]
        return (
            0 < x.numel() <= MOST_TOKENS * x.shape[-1]
            and all(w.dtype is x.dtype and w.is_cpu for w in weights)
            and not _hooks_of_all_modules()
        )


def find(model: Any, norms: Mapping[Any, Any]) -> tuple[tuple[Any, Forward], ...]:
    """The modules of a model that the native kernels compute, with the forward pass that takes the place of theirs.

    Args:
        norms: the RMS norms that `nabla_fast.models.token_layers` computes.
    """
    found: list[tuple[Any, Forward]] = []
    for module in model.modules():
        parts = set(module._modules)
        made: Forward | None = None
        if own_attribute(module, "forward") is not None:
            continue  # another library's
        # An activation that is no module could be replaced without a sign.
        if parts == {*_GATED, _ACTIVATION}:
            made = _gated_mlp(module)
        elif set(_PROJECTIONS) <= parts <= {*_PROJECTIONS, *_HEAD_NORMS}:
            made = _attention(module, norms)
        if made is not None:
            found.append((module, made))
    return tuple(found)


def _gated_mlp(module: Any) -> Forward | None:
    activation = _activation_of(module._modules[_ACTIVATION])
    if activation is None or not all(_is_plain_linear(module._modules[name]) for name in _GATED):
        return None
    x = random_like(module.gate_proj.weight, (1, 3, module.gate_proj.in_features), 0)
    ours = GatedMLP(module, refuse, activation)
    # Large numbers show what is cut off.
    fits = all(same(module.forward, ours, [size * x], gradient=False) for size in (1.0, 30.0))
    return GatedMLP(module, module.forward, activation) if fits else None


def _attention(module: Any, norms: Mapping[Any, Any]) -> Forward | None:
    needed = ("config", "head_dim", "layer_idx", "scaling")
    heads = [module._modules[name] for name in _HEAD_NORMS if name in module._modules]
    settings = {(norms[part].epsilon, norms[part].offset) if part in norms else None for part in heads}
    if (
        not all(hasattr(module, name) for name in needed)
        or not all(_is_plain_linear(module._modules[name]) for name in _PROJECTIONS)
        or len(heads) == 1
        or None in settings
        or len(settings) > 1
    ):
        return None
    parameters = list(inspect.signature(module.forward).parameters)
    argument = next((name for name in CACHE_NAMES if name in parameters), None)
    known = parameters[:1] == ["hidden_states"] and argument is not None
    if not known or module.config._attn_implementation != ATTENTION:
        return None
    return Attention(module, module.forward, norms) if _attention_is_same(module, str(argument), norms) else None


def _attention_is_same(module: Any, argument: str, norms: Mapping[Any, Any]) -> bool:
    """Of three tokens behind four others, one of which is masked; and without a cache."""
    weight, size = module.k_proj.weight, module.head_dim
    past, new = 4, 3
    heads = max(1, len(weight) // size)
    before = [random_like(weight, (1, heads, past, size), seed) for seed in (1, 2)]
    tables = tuple(random_like(weight, (1, new, size), seed) for seed in (3, 4))
    mask = torch.ones(1, 1, new, past + new, dtype=torch.bool).tril(past)
    mask[..., 1] = False

    def run(forward: Forward) -> Callable[..., list[Tensor]]:
        def outputs(x: Tensor) -> list[Tensor]:
            cache = DynamicCache()
            cache.update(before[0], before[1], module.layer_idx)
            found = []
            for own, read in (({argument: cache}, mask), ({argument: None}, mask[..., past:])):
                out, weights = forward(hidden_states=x, position_embeddings=tables, attention_mask=read, **own)
                if weights is not None:
                    raise NotImplementedError("attention weights")
                found.append(out)
            kept: Any = cache.layers[module.layer_idx]
            return [*found, kept.keys, kept.values]

        return outputs

    x = random_like(weight, (1, new, module.k_proj.in_features), 0)
    return same(run(module.forward), run(Attention(module, refuse, norms)), [x], gradient=False)


def _activation_of(function: Any) -> str | None:
    """Its name among `nabla_fast.ops.token_layers.ACTIVATIONS`."""
    x = torch.linspace(-6, 6, 101)
    try:
        values = function(x)
    except Exception:  # whatever a function of something else raises
        return None
    names = token_layers.ACTIVATIONS.items()
    return next((name for name, own in names if torch.allclose(values, own(x), rtol=1e-6, atol=1e-6)), None)


def _is_plain_linear(layer: Any) -> bool:
    return (
        type(layer) is nn.Linear
        and own_attribute(layer, "forward") is None
        and is_plain(layer.weight)
        and not layer.weight.is_meta
    )


def _linear(layer: Any) -> token_layers.Linear:
    own = layer._parameters
    return own["weight"], own["bias"]


def _are_tables(tables: Any, x: Tensor) -> bool:
    """Whether they are cosines and sines, those of every row or of all of them."""
    if not (isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(t, Tensor) for t in tables)):
        return False
    cos, sin = tables
    batch, tokens, _ = x.shape
    own = cos.ndim == 3 and cos.shape[1] == tokens and cos.shape[0] in (1, batch)
    return own and cos.shape == sin.shape and cos.dtype is sin.dtype is x.dtype


def _hooks_of_all_modules() -> bool:
    of_all: Any = nn.modules.module
    return bool(of_all._global_forward_hooks or of_all._global_forward_pre_hooks)
