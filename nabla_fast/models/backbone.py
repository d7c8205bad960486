"""The backbone of a model, everything but its head: passes over whole sequences, and over what follows a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from nabla_fast.models import checks, native_layers
from nabla_fast.models.fused_layers import fused_layers
from nabla_fast.models.kv_cache import KVCache, ModelCache, PaddedCache, layout

# What families call the cache that they make themselves, in their outputs and among their arguments.
_CACHES = ("cache", "past_key_values", "cache_params", "state")
_BACKBONES = ("model", "transformer", "backbone", "decoder", "language_model")

Cache = KVCache | ModelCache


@dataclass(frozen=True)
class Inputs:
    """The input of a model: S tokens.

    Attributes:
        ids: (S,) int64 in the model's own vocabulary; -1 for a token that it does not have.
        embeds: (S, d) what its input embeddings make of them.
    """

    ids: Tensor
    embeds: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, part: slice) -> Inputs:
        return Inputs(self.ids[part], self.embeds[part])

    @property
    def device(self) -> torch.device:
        return self.embeds.device

    def differentiable(self) -> Inputs:
        """The same, with embeddings that ask for a gradient of their own."""
        return replace(self, embeds=self.embeds.detach().requires_grad_())


def embedded(embedding: Any, ids: Tensor) -> Inputs:
    """Token ids (S,) and what input embeddings make of them."""
    return Inputs(ids, embedding(ids.unsqueeze(0))[0].detach())


def joined(parts: Sequence[Inputs]) -> Inputs:
    """One after the other."""
    return Inputs(torch.cat([x.ids for x in parts]), torch.cat([x.embeds for x in parts]))


class Backbone:
    """A model without its head. A call runs the tokens behind cached prefixes alone, where that is exact.

    What a model supports is found out once, by trying (`nabla_fast.models.checks`).

    Args:
        model: a transformers model in ``eval()``.
        name: what warnings and errors call it.
        ids: (n,) token ids to try it with; None picks some.

    Attributes:
        model: as given.
        module: the part of it that ends in the last hidden states.
        cache_kind: "prefix" if the KV cache of a sequence can be cropped anywhere and padded into a batch; "state" if
            each sequence runs alone, with the cache that the model makes itself (a recurrent state); "whole" if every
            call takes whole sequences.
        supports_prefix_cache: whether a gradient may begin behind a cached prefix. If not, it takes whole sequences.
        windowed: whether a layer's attention reaches back a fixed number of columns, gaps among them.
        plain_cache: whether the model has to be given a ``DynamicCache`` to return one.
        cache_argument: the name of the cache among the arguments of the module's forward pass.
        output: applied to the last hidden states (B, S, d) of every pass.
        tried: (n, d) the last hidden states of ``ids``.
        fused: its layers that `fast_kernels` exchanges.
        native: what computes all of its layers in one call, for few tokens, while those are exchanged.
        needs_ids: whether the model reads token ids besides input embeddings, as those with per-layer embeddings do.

    Raises:
        ValueError: if the model computes something else behind its embeddings than on its token ids, or its gradient
            is not that of its forward pass.

    Warns:
        UserWarning: once per model that does not run in batches behind prefixes, with the reason.
    """

    def __init__(self, model: Any, name: str, ids: Tensor | None = None) -> None:
        self.model = model
        self.name = name
        self.module = find_backbone(model)
        self.embedding = model.get_input_embeddings()
        parameters = inspect.signature(self.module.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._arguments = None if takes_any else frozenset(parameters)
        self._wants_cache_position = "cache_position" in parameters
        self.cache_argument = cache_argument(self.module)
        self.output: Callable[[Tensor], Tensor] = lambda hidden: hidden
        # Until the checks have found out.
        self.cache_kind, self.supports_prefix_cache, self.windowed = "prefix", True, False
        self.needs_ids = self.plain_cache = False
        self.native: native_layers.NativeLayers | None = None
        self.tried: Tensor
        found = checks.remembered(model, name, "backbone", lambda: checks.examine_backbone(self, ids))
        vars(self).update(vars(found))
        self.fused = fused_layers(model, name)
        tried = checks.probe_ids(model) if ids is None else ids
        self.native = checks.remembered(model, name, "native layers", lambda: native_layers.find(self, tried))
        if found.reason is not None:
            checks.warn_once(model, f"{name} {_SLOWER[found.cache_kind, found.supports_prefix_cache]}: {found.reason}")

    @property
    def device(self) -> torch.device:
        """Of the input embeddings, where passes begin; the layers of a model may be on several devices."""
        device: torch.device = self.embedding.weight.device
        return device

    def __call__(
        self, caches: Sequence[Cache | None], inputs: Sequence[Inputs]
    ) -> tuple[list[Tensor], list[Cache | None]]:
        """Runs B suffixes of different lengths, each behind its cached prefix.

        Args:
            caches: of each prefix; None where there is none. All None unless `supports_prefix_cache`.
            inputs: S_b >= 1 tokens each. Gradients flow to their embeddings, and not to the prefixes.

        Returns:
            The last hidden states (S_b, d) of each suffix; the caches of prefix and suffix together, without autograd
            graph, or None where the model gives none.

        Raises:
            ValueError: if the model `needs_ids`, and its vocabulary does not have a token.
        """
        if self.needs_ids and any(bool((x.ids < 0).any()) for x in inputs):
            raise ValueError(
                f"{self.name} reads more of a token than its input embedding, so it needs ids of its own vocabulary; "
                "give tokens, and a tokenizer whose every token is in the model's vocabulary"
            )
        if self.cache_kind == "prefix" and self.supports_prefix_cache:
            return self._extend_batch(caches, inputs)
        # Alone: some of these models are not independent of what else is in the batch.
        behind = self.supports_prefix_cache and any(cache is not None for cache in caches)
        if not behind:
            return [self.whole(x) for x in inputs], [None] * len(inputs)
        # What these models make of a prefix is part of the graph.
        return [self._proceed(c, x)[0] for c, x in zip(caches, inputs, strict=True)], [None] * len(inputs)

    @torch.no_grad()
    def extend(self, caches: Sequence[Cache | None], inputs: Sequence[Inputs]) -> tuple[list[Tensor], list[Cache]]:
        """`__call__` without autograd, for generation. Not for models whose ``cache_kind`` is "whole"."""
        if self.cache_kind == "prefix":
            return self._extend_batch(caches, inputs)
        rows = [self._extend_alone(c, x) for c, x in zip(caches, inputs, strict=True)]
        return [hidden for hidden, _ in rows], [cache for _, cache in rows]

    def whole(self, inputs: Inputs, *, by_ids: bool = False) -> Tensor:
        """The last hidden states (S, d) of one sequence from its beginning.

        Args:
            by_ids: lets the model look up its embeddings itself.
        """
        embeds = None if by_ids else inputs.embeds.unsqueeze(0)
        return self.run(inputs.ids.unsqueeze(0), embeds, 0, use_cache=False)[0][0]

    def step(self, ids: Tensor, cache: ModelCache) -> ModelCache:
        """Runs more tokens (k,) behind ``cache``, which is changed in place."""
        return self._own(cache, ids.unsqueeze(0), None)[1]

    def run(self, ids: Tensor, embeds: Tensor | None, past: int, **options: Any) -> tuple[Tensor, Any]:
        """A forward pass of the backbone over tokens (B, S) behind ``past`` others: hidden states, and all it returns.

        Without padding there is no mask: recurrent layers take one for the new tokens alone, where others want it for
        all.
        """
        size = ids.shape[1]
        options.setdefault("position_ids", torch.arange(past, past + size, device=ids.device).expand(len(ids), size))
        if self._wants_cache_position:
            options["cache_position"] = torch.arange(past, past + size, device=ids.device)
        accepted = self._arguments
        options = {name: value for name, value in options.items() if accepted is None or name in accepted}
        # A copy: some models change their embeddings in place.
        embeds = None if embeds is None else embeds.clone()
        if embeds is None:
            out = self.module(input_ids=ids, **options)
        elif not self.needs_ids:
            out = self.module(inputs_embeds=embeds, **options)
        else:
            with embeddings_replaced(self.embedding, ids, embeds, self.name):
                out = self.module(input_ids=ids, **options)
        return self.output(out.last_hidden_state), out

    def _extend_batch(self, caches: Sequence[Any], inputs: Sequence[Inputs]) -> tuple[list[Tensor], list[Any]]:
        past = [0 if cache is None else len(cache) for cache in caches]
        sizes = [len(x) for x in inputs]
        padded = PaddedCache(caches, max(past))
        mask, positions = layout(past, sizes, inputs[0].device)
        last_hidden, _ = self.run(
            pad_sequence([x.ids for x in inputs], batch_first=True),
            pad_sequence([x.embeds for x in inputs], batch_first=True),
            max(past),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_argument: padded},
        )
        hidden = [last_hidden[row, :size] for row, size in enumerate(sizes)]
        after = [
            padded.row(row, max(past) - past[row], max(past) + size, cache, hidden[row].detach())
            for row, (size, cache) in enumerate(zip(sizes, caches, strict=True))
        ]
        return hidden, after

    def _extend_alone(self, cache: Any, inputs: Inputs) -> tuple[Tensor, ModelCache]:
        if cache is None or self.supports_prefix_cache or len(inputs) == 1:
            return self._proceed(cache, inputs)
        # Behind its own cache, such a model is right about one token at a time.
        hidden = []
        for i in range(len(inputs)):
            rows, cache = self._proceed(cache, inputs[i : i + 1])
            hidden.append(rows)
        return torch.cat(hidden), cache

    def _proceed(self, cache: Any, inputs: Inputs) -> tuple[Tensor, ModelCache]:
        """One sequence behind its prefix, which stays as it is."""
        ids, embeds = inputs.ids.unsqueeze(0), inputs.embeds.unsqueeze(0)
        if cache is None:
            return self._own(None, ids, embeds)
        if not torch.is_grad_enabled():
            return self._own(cache.copy(), ids, embeds)
        with cache.differentiable() as own:
            return self._own(own, ids, embeds)

    def _own(self, cache: ModelCache | None, ids: Tensor, embeds: Tensor | None) -> tuple[Tensor, ModelCache]:
        past = 0 if cache is None else len(cache)
        if cache is not None:
            given = {cache.argument: cache.cache}
        else:
            given = {self.cache_argument: DynamicCache()} if self.plain_cache else {}
        (hidden,), out = self.run(ids, embeds, past, use_cache=True, **given)
        argument = next((name for name in _CACHES if getattr(out, name, None) is not None), None)
        if argument is None:
            raise TypeError("it returns no cache")
        kept = getattr(out, argument)
        return hidden, ModelCache(kept, argument, past + ids.shape[1], hidden[-1:].detach())


@contextmanager
def embeddings_replaced(module: Any, ids: Tensor, embeds: Tensor, name: str) -> Iterator[None]:
    """In this block and thread, ``module``, input embeddings, gives ``embeds`` (B, S, d) for token ids (B, S).

    The model goes on from token ids, with whatever else it makes of them, and gradients flow to ``embeds``. A model may
    put tokens of its own before them.

    Raises:
        ValueError: at the block's end, if nothing was looked up.
    """
    thread, looked_up = get_ident(), False
    size = ids.shape[1]

    def replace(_module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        nonlocal looked_up
        read = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
        if get_ident() != thread or read is None or read.ndim != 2 or not torch.equal(read[:, -size:].long(), ids):
            return None
        looked_up = True
        more = output.shape[1] - size
        return torch.cat([output[:, :more], embeds], dim=1) if more else embeds

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if not looked_up:
        raise ValueError(f"{name} does not look its tokens up in its input embeddings, so it has no gradient here")


def find_backbone(model: Any) -> Any:
    """The part of a transformers model that maps tokens to the last hidden states."""
    base = model.base_model
    if base is not model or getattr(model, "get_output_embeddings", lambda: None)() is None:
        return base
    # Some families' models are their own base model.
    return next((part for name in _BACKBONES if (part := getattr(model, name, None)) is not None), base)


def cache_argument(backbone: Any) -> str:
    """The name of the KV cache among a forward pass's arguments; transformers 5.24 gave it a new one."""
    # Some backbones are wrappers that pass on whatever they are given.
    forwards = [backbone.forward, *(part.forward for part in getattr(backbone, "children", tuple)())]
    return "cache" if any("cache" in inspect.signature(f).parameters for f in forwards) else "past_key_values"


_SLOWER = {
    ("state", True): "runs one sequence at a time, without drafts",
    ("state", False): "runs one sequence at a time and takes whole sequences for every gradient, slower",
    ("whole", False): "takes whole sequences for every gradient and for every token that it generates, slow",
}
