"""A decoder without its head: forward passes over whole sequences, and over what follows a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from nabla_fast.models import checks
from nabla_fast.models.prefix import Continuation, OwnState, PrefixState, layout

# What families call the cache that they make themselves, in their outputs and among their arguments.
_CACHES = ("cache", "past_key_values", "cache_params", "state")
_BACKBONES = ("model", "transformer", "backbone", "decoder", "language_model")

State = PrefixState | OwnState


@dataclass(frozen=True)
class Inputs:
    """What a decoder reads of S tokens.

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
        return Inputs(self.ids, self.embeds.detach().requires_grad_())


def joined(parts: Sequence[Inputs]) -> Inputs:
    """One after the other."""
    return Inputs(torch.cat([x.ids for x in parts]), torch.cat([x.embeds for x in parts]))


class Body:
    """A decoder without its head, whose calls go on from prefixes where that is exact.

    How it runs is found out once per model, by trying (`nabla_fast.models.checks`).

    Args:
        model: a transformers model in ``eval()``.
        name: what warnings and errors call it.
        ids: (n,) token ids to try it with; None picks some.

    Attributes:
        model: as given.
        backbone: the part of it that ends in the last hidden states.
        way: "prefix" if sequences run in batches behind keys and values that can be cut anywhere; "state" if each runs
            alone, behind the cache that the model makes itself; "whole" if a call takes nothing but whole sequences.
        incremental: whether a gradient may begin behind a prefix. If not, every gradient takes whole sequences.
        windowed: whether a layer's attention reaches back a fixed number of columns, gaps among them.
        plain_cache: whether the cache of its own is one of keys and values that has to be given to it.
        cache_argument: what the backbone calls its cache of keys and values.
        output: what is made of the last hidden states (B, S, d) of every pass.
        tried: (n, d) the last hidden states of ``ids``.
        needs_ids: whether embeddings alone do not say what the model reads, as with embeddings per layer.

    Raises:
        ValueError: if the model computes something else behind its embeddings than on its token ids, or its gradient
            is not that of its forward pass.

    Warns:
        UserWarning: once per model that does not run in batches behind prefixes, with the reason.
    """

    def __init__(self, model: Any, name: str, ids: Tensor | None = None) -> None:
        self.model = model
        self.name = name
        self.backbone = find_backbone(model)
        self.embedding = model.get_input_embeddings()
        parameters = inspect.signature(self.backbone.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._arguments = None if takes_any else frozenset(parameters)
        self._wants_cache_position = "cache_position" in parameters
        self.cache_argument = cache_argument(self.backbone)
        self.output: Callable[[Tensor], Tensor] = lambda hidden: hidden
        # Until the checks have found out.
        self.way, self.incremental, self.windowed = "prefix", True, False
        self.needs_ids = self.plain_cache = False
        found = checks.remembered(model, name, "body", lambda: checks.examine_body(self, ids))
        self.way, self.incremental, self.windowed = found.way, found.incremental, found.windowed
        self.needs_ids, self.plain_cache, self.tried = found.needs_ids, found.plain_cache, found.expected
        if found.reason is not None:
            checks.warn_once(model, f"{name} {_MANNERS[found.way, found.incremental]}: {found.reason}")

    def __call__(
        self, states: Sequence[State | None], inputs: Sequence[Inputs | Tensor]
    ) -> tuple[list[Tensor], list[State | None]]:
        """Runs B ragged suffixes, each behind its prefix.

        Args:
            states: the prefix of each; None for nothing. Only None unless `incremental`.
            inputs: S_b >= 1 tokens each; gradients flow to their embeddings and not to the prefixes. Embeddings
                (S_b, d) alone will do unless `needs_ids`.

        Returns:
            The last hidden states (S_b, d) of each suffix; the states of prefix and suffix together, without graph,
            where the pass makes them.
        """
        read = [self._inputs(x) for x in inputs]
        if self.way == "prefix" and self.incremental:
            hidden, after = self._extend_batch(states, read)
            return hidden, list(after)
        # Alone: some of these models are not independent of what else is in the batch.
        behind = self.incremental and any(state is not None for state in states)
        if not behind:
            return [self.whole(x) for x in read], [None] * len(read)
        # What these models make of a prefix is part of the graph.
        return [self._proceed(s, x)[0] for s, x in zip(states, read, strict=True)], [None] * len(read)

    @torch.no_grad()
    def extend(self, states: Sequence[State | None], inputs: Sequence[Inputs]) -> tuple[list[Tensor], list[State]]:
        """The same without autograd, as the model generates text; not for a model that takes "whole" sequences."""
        if self.way == "prefix":
            hidden, after = self._extend_batch(states, inputs)
            return hidden, list(after)
        rows = [self._extend_alone(s, x) for s, x in zip(states, inputs, strict=True)]
        return [hidden for hidden, _ in rows], [state for _, state in rows]

    def whole(self, inputs: Inputs, *, by_ids: bool = False) -> Tensor:
        """The last hidden states (S, d) of one sequence from its beginning.

        Args:
            by_ids: lets the model look up its embeddings itself.
        """
        embeds = None if by_ids else inputs.embeds.unsqueeze(0)
        return self.run(inputs.ids.unsqueeze(0), embeds, 0, use_cache=False)[0][0]

    def step(self, ids: Tensor, state: OwnState) -> OwnState:
        """Reads more tokens (k,) behind ``state``, which is used up."""
        return self._own(state, ids.unsqueeze(0), None)[1]

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
            out = self.backbone(input_ids=ids, **options)
        elif not self.needs_ids:
            out = self.backbone(inputs_embeds=embeds, **options)
        else:
            with embeddings_replaced(self.embedding, ids, embeds, self.name):
                out = self.backbone(input_ids=ids, **options)
        return self.output(out.last_hidden_state), out

    def _inputs(self, x: Inputs | Tensor) -> Inputs:
        if not isinstance(x, Inputs):
            x = Inputs(torch.full((len(x),), -1, dtype=torch.long, device=x.device), x)
        if self.needs_ids and bool((x.ids < 0).any()):
            raise ValueError(
                f"{self.name} reads more of a token than its input embedding, so it needs ids of its own vocabulary; "
                "give tokens, and a tokenizer whose every token is in the model's vocabulary"
            )
        return x

    def _extend_batch(self, states: Sequence[Any], inputs: Sequence[Inputs]) -> tuple[list[Tensor], list[PrefixState]]:
        past = [0 if state is None else len(state) for state in states]
        sizes = [len(x) for x in inputs]
        cache = Continuation(states, max(past))
        mask, positions = layout(past, sizes, inputs[0].device)
        last_hidden, _ = self.run(
            pad_sequence([x.ids for x in inputs], batch_first=True),
            pad_sequence([x.embeds for x in inputs], batch_first=True),
            max(past),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_argument: cache},
        )
        hidden = [last_hidden[row, :size] for row, size in enumerate(sizes)]
        after = [
            cache.row(row, max(past) - past[row], max(past) + size, state, hidden[row].detach())
            for row, (size, state) in enumerate(zip(sizes, states, strict=True))
        ]
        return hidden, after

    def _extend_alone(self, state: Any, inputs: Inputs) -> tuple[Tensor, OwnState]:
        if state is None or self.incremental or len(inputs) == 1:
            return self._proceed(state, inputs)
        # Behind its own cache, such a model is right about one token at a time.
        hidden = []
        for i in range(len(inputs)):
            rows, state = self._proceed(state, inputs[i : i + 1])
            hidden.append(rows)
        return torch.cat(hidden), state

    def _proceed(self, state: Any, inputs: Inputs) -> tuple[Tensor, OwnState]:
        """One sequence behind its prefix, which stays as it is."""
        ids, embeds = inputs.ids.unsqueeze(0), inputs.embeds.unsqueeze(0)
        if state is None:
            return self._own(None, ids, embeds)
        if not torch.is_grad_enabled():
            return self._own(state.copy(), ids, embeds)
        with state.differentiable() as own:
            return self._own(own, ids, embeds)

    def _own(self, state: OwnState | None, ids: Tensor, embeds: Tensor | None) -> tuple[Tensor, OwnState]:
        past = 0 if state is None else len(state)
        if state is not None:
            given = {state.argument: state.cache}
        else:
            given = {self.cache_argument: DynamicCache()} if self.plain_cache else {}
        (hidden,), out = self.run(ids, embeds, past, use_cache=True, **given)
        argument = next((name for name in _CACHES if getattr(out, name, None) is not None), None)
        if argument is None:
            raise TypeError("it returns no cache")
        kept = getattr(out, argument)
        return hidden, OwnState(kept, argument, past + ids.shape[1], hidden[-1:].detach())


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
    """What a forward pass calls its cache of keys and values; transformers 5.24 gave it a new name."""
    # Some backbones are wrappers that pass on whatever they are given.
    forwards = [backbone.forward, *(part.forward for part in getattr(backbone, "children", tuple)())]
    return "cache" if any("cache" in inspect.signature(f).parameters for f in forwards) else "past_key_values"


_MANNERS = {
    ("state", True): "runs one sequence at a time, without drafts",
    ("state", False): "runs one sequence at a time and takes whole sequences for every gradient, slower",
    ("whole", False): "takes whole sequences for every gradient and for every token that it generates, slow",
}
