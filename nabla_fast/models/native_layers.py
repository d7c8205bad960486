"""All decoder layers of a model on a CPU as one native call, for few tokens of a batch that is decoded.

Without it, a token of a small model waits as long for what is between its layers' products as for half of their
weights. Drafts read a quarter of those: the same layers with weights rounded to 8 bits, row by row, behind the same
keys and values. They foresee nearly all tokens; what they foresee is verified with the weights as they are.

Layers whose modules `nabla_fast.models.token_modules` computes are tried on random numbers, each by itself, and then
all of them on a few tokens. A model that is no longer as it was goes its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nabla_fast.models import token_layers
from nabla_fast.models.growing_cache import GrowingCache
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.layer_trials import random_like, same
from nabla_fast.models.numerics import is_close
from nabla_fast.models.temporary import own_attribute
from nabla_fast.models.token_modules import CACHE_NAMES, Attention, GatedMLP, Parts
from nabla_fast.ops import linear as native_linear
from nabla_fast.ops.token_layers import DecoderLayers, decoder_layers

if TYPE_CHECKING:
    from nabla_fast.models.backbone import Backbone

_OF_BACKBONE = ("embed_tokens", "layers", "norm", "rotary_emb")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MODULES = ("self_attn", "mlp")
_ALL_NORMS = 4
# Tokens that all layers are tried on together.
_TRIED = 8


class NativeLayers:
    """The forward pass of a backbone whose layers are ``y + mlp(norm(y))``, ``y = x + self_attn(norm(x))``.

    It is given that backbone in each call: what is remembered of a model must not keep the model.

    Args:
        module: the backbone.
        layers: its layers, and what computes their modules.
        settings: those of `DecoderLayers`, the same for all layers.
    """

    def __init__(self, module: Any, layers: list[tuple[Any, Attention, GatedMLP]], settings: dict[str, Any]) -> None:
        self.settings = settings
        self._attention = [attention.module for _, attention, _ in layers]
        # Whatever is not called, and whose own forward pass would be missed.
        self._bypassed = [part for layer, *_ in layers for part in (layer, *_modules(layer))]
        self._layers = [
            Parts(layer, norms=_NORMS, bypassed=_MODULES, inner=(attention.parts, mlp.parts))
            for layer, attention, mlp in layers
        ]
        self._kinds = [type(module), *(type(layer) for layer, *_ in layers)]
        self._order = [layer for layer, *_ in layers]
        self._rough: tuple[list[Any], DecoderLayers] | None = None

    def weights(self, module: Any) -> DecoderLayers | None:
        """The layers' weights, if the model is as it was when it was tried, and its kernels are exchanged for now."""
        sample = module.norm.weight[None, None]
        as_tried = (
            _is_exchanged()
            and token_layers.is_for_kernels(sample)
            and all(
                own_attribute(part, "forward") is None and not _has_hooks(part) for part in (module, *self._bypassed)
            )
            and all(
                part.config._attn_implementation == token_layers.ATTENTION
                and part.scaling == self.settings["scaling"]
                and not part.training
                for part in self._attention
            )
            and len(module.layers) == len(self._order)
            and all(layer is own for layer, own in zip(module.layers, self._order, strict=True))
            and [type(module), *map(type, self._order)] == self._kinds
            and all(parts.fit(sample) for parts in self._layers)
        )
        return _weights(self._layers, self.settings) if as_tried else None

    def rounded(self, exact: DecoderLayers) -> DecoderLayers:
        """The layers with weights of 8 bits, rounded anew when they have changed."""
        state = [native_linear.state(weight) for weight in exact.weights]
        if self._rough is None or self._rough[0] != state:
            self._rough = None  # not both at a time
            rounded = [native_linear.rounded(weight) for weight in exact.weights]
            values, scales = [x for x, _ in rounded], [x for _, x in rounded]
            self._rough = state, replace(exact, weights=values, scales=scales)
        return self._rough[1]

    def run(
        self,
        module: Any,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: GrowingCache,
        layers: DecoderLayers,
    ) -> Tensor:
        """The last hidden states (B, S, d) of tokens (B, S) behind those in ``cache``, where theirs are written.

        Args:
            positions: (B, S).
            mask: as `decoder_layers` takes it.
            layers: of `weights`, or `rounded`.
        """
        x = module.embed_tokens(ids)
        cos, sin = module.rotary_emb(x, position_ids=positions)
        past = [layer.reserve(ids.shape[1]) for layer in cache.layers]
        keys, values = zip(*(layer.buffers for layer in cache.layers), strict=True)
        out = decoder_layers(x, layers, cos, sin, mask, keys, values, past[0])
        cache.use(past[0] + ids.shape[1])
        hidden: Tensor = module.norm(out)
        return hidden


def find(backbone: Backbone, ids: Tensor) -> NativeLayers | None:
    """What computes the layers of a backbone in one call; None where that is not known to give the same.

    Args:
        ids: (n,) token ids to try it with, n >= 1.
    """
    module, fused = backbone.module, backbone.fused
    norms: dict[Any, Any] = dict(fused.norms)
    if (
        backbone.cache_kind != "prefix"
        or backbone.windowed
        or backbone.needs_ids
        or not fused.attention
        or set(module._modules) != set(_OF_BACKBONE)
        or not isinstance(module.layers, torch.nn.ModuleList)
        or module.norm not in norms
        or getattr(module.norm, "weight", None) is None
    ):
        return None
    known = [_known(layer, index, dict(fused.modules), norms) for index, layer in enumerate(module.layers)]
    layers = [layer for layer in known if layer is not None]
    settings = [_settings(layer, attention, mlp, norms) for layer, attention, mlp in layers]
    if not layers or len(layers) < len(known) or any(own != settings[0] for own in settings):
        return None
    found = NativeLayers(module, layers, settings[0])
    alone = zip(layers, found._layers, strict=True)
    if not all(_is_same(layer, parts, settings[0]) for (layer, *_), parts in alone):
        return None
    try:
        return found if _is_same_together(backbone, found, ids) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model that is put together in another way raises
        return None


def _known(
    layer: Any, index: int, modules: Mapping[Any, Any], norms: Mapping[Any, Any]
) -> tuple[Any, Attention, GatedMLP] | None:
    """A layer and what computes its modules, if they are of the kinds that a decoder layer has."""
    if set(layer._modules) != {*_NORMS, *_MODULES}:
        return None
    attention, mlp = (modules.get(part) for part in _modules(layer))
    before, after = (norms.get(layer._modules[name]) for name in _NORMS)
    if not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP) or before is None or after is None:
        return None
    alike = (before.epsilon, before.offset) == (after.epsilon, after.offset)
    return (layer, attention, mlp) if alike and attention.module.layer_idx == index else None


def _modules(layer: Any) -> list[Any]:
    return [layer._modules[name] for name in _MODULES]


def _settings(layer: Any, attention: Attention, mlp: GatedMLP, norms: Mapping[Any, Any]) -> dict[str, Any]:
    norm = norms[layer._modules[_NORMS[0]]]
    return {
        "scaling": attention.module.scaling,
        "epsilon": norm.epsilon or 0.0,
        "offset": norm.offset,
        "head_epsilon": attention.epsilon,
        "head_offset": attention.offset,
        "activation": mlp.activation,
    }


def _weights(layers: Iterable[Parts], settings: Mapping[str, Any]) -> DecoderLayers:
    own = [part._parameters for parts in layers for part in parts.linears]
    norms: list[Tensor | None] = []
    for parts in layers:
        found = [part._parameters["weight"] for part in parts.norms]
        norms += [*found, *[None] * (_ALL_NORMS - len(found))]
    weights, biases = [part["weight"] for part in own], [part["bias"] for part in own]
    return DecoderLayers(weights, [None] * len(weights), biases, norms, **settings)


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_exchanged() -> bool:
    """Whether "sdpa" is `token_layers.attention` for now, and nobody else's function."""
    return getattr(ALL_ATTENTION_FUNCTIONS[token_layers.ATTENTION], "func", None) is token_layers.attention


def _is_same(layer: Any, parts: Parts, settings: Mapping[str, Any]) -> bool:
    """Whether a layer by itself gives what the kernel does: three tokens behind four others, one of them masked."""
    names = list(inspect.signature(layer.forward).parameters)
    argument = next((name for name in CACHE_NAMES if name in names), None)
    if names[:1] != ["hidden_states"] or argument is None:
        return False
    attention = layer.self_attn
    projection, size, index = attention.k_proj, attention.head_dim, attention.layer_idx
    weight = projection.weight
    batch, past, new = 2, 4, 3
    heads = max(1, len(weight) // size)
    before = [random_like(weight, (batch, heads, past, size), seed) for seed in (1, 2)]
    tables = random_like(weight, (1, new, size), 3), random_like(weight, (1, new, size), 4)
    mask = torch.ones(batch, 1, new, past + new, dtype=torch.bool).tril(past)
    mask[0, ..., 1] = mask[1, ..., 0] = False

    def cache() -> GrowingCache:
        rows = [[part[row : row + 1] for part in before] for row in range(batch)]
        return GrowingCache([KVCache((k,) * (index + 1), (v,) * (index + 1), k[0, 0]) for k, v in rows], past)

    def theirs(x: Tensor) -> list[Tensor]:
        given = cache()
        options = {"position_embeddings": tables, "attention_mask": mask, argument: given, "use_cache": True}
        out = layer.forward(x, **options)
        if not isinstance(out, Tensor):
            raise NotImplementedError("more than hidden states")
        return [out, given.layers[index].keys, given.layers[index].values]

    def ours(x: Tensor) -> list[Tensor]:
        kept = cache().layers[index]
        kept.reserve(new)
        keys, values = kept.buffers
        out = decoder_layers(x, _weights([parts], settings), *tables, mask, [keys], [values], past)
        return [out, *kept.use(past + new)]

    x = random_like(weight, (batch, new, projection.in_features), 0)
    return same(theirs, ours, [x], gradient=False)


def _is_same_together(backbone: Backbone, found: NativeLayers, ids: Tensor) -> bool:
    """Whether all layers give what the backbone does: two rows of different lengths, near the beginning and far on."""
    from nabla_fast.models.backbone import embedded
    from nabla_fast.models.decode_batch import DecodeBatch
    from nabla_fast.models.fused_layers import fast_kernels

    ids = ids.repeat(-(-_TRIED // len(ids)))[:_TRIED]
    inputs = embedded(backbone.embedding, ids)
    with torch.no_grad():
        _, caches = backbone.extend([None, None], [inputs[:6], inputs[:3]])
        for further in (0, _far(backbone.model)):
            pairs = []
            for native in (None, found):
                batch = DecodeBatch(backbone, caches)  # type: ignore[arg-type]
                batch.native = native
                batch.lengths = [length + further for length in batch.lengths]
                with fast_kernels(backbone.device, *([] if native is None else [backbone.fused])):
                    first = batch.step([ids[6:8].tolist(), ids[3:6].tolist()])
                    batch.keep([1, 3])
                    pairs.append([*first, *batch.step([ids[7:8].tolist(), ids[6:7].tolist()])])
                if batch.native is not native:
                    return False
            if not all(is_close(ours, theirs) for theirs, ours in zip(*pairs, strict=True)):
                return False
    return True


def _far(model: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max(0, (positions or 2048) - 32)
