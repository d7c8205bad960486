"""Passes of constant shapes through a transformers decoder as it is, for capture in graphs.

What differs from call to call (where a sequence begins and ends, which tokens it has) is in tensors on the device, and
attention masks and positions are made from them there. A prefix stands right-aligned in a buffer, so that what follows
it begins in the same column, whatever its length:

    [ unused | prefix | suffix | unused ]
             ^first   ^P               ^P + S

Nothing is written in place where autograd would see it: a layer attends to the buffer and its new keys, one behind the
other.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nabla_fast.graphs import Counts, Graphs, bucket
from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone, Inputs, embedded
from nabla_fast.models.decoder_layers import CompiledLayers, compiled_graphs
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.numerics import is_close, relative_error

# Columns of a prefix buffer, at the least; a prefix that outgrows them needs a graph of its own.
_COLUMNS = 1024


def attention_masks(config: Any, first: Tensor, queries: Tensor, columns: int, dtype: torch.dtype) -> Any:
    """Additive causal masks (B, 1, S, ``columns``), 0 where a query sees a column and the dtype's minimum elsewhere.

    A query sees no column before its row's first, and none behind itself; in layers with a sliding window, only the
    nearest ones.

    Args:
        config: the model's text config.
        first: (B,) int64, the first column of each row.
        queries: (B or 1, S) int64, the columns that the queries are in.

    Returns:
        One mask, or a dict of them by kind of layer where kinds differ.
    """
    kinds = _windows(config)
    masks = {kind: _mask(first, queries, columns, window, dtype) for kind, window in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(config: Any) -> dict[str, int | None]:
    """Kind of layer → how many columns its attention reaches back, None for all."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _mask(first: Tensor, queries: Tensor, columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
    column = torch.arange(columns, device=first.device)
    seen = (column <= queries.unsqueeze(-1)) & (column >= first.view(-1, 1, 1))
    if window is not None:
        seen = seen & (column > queries.unsqueeze(-1) - window)
    # Not -inf: a row that sees nothing (padding before the first column) would be NaN.
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=first.device).masked_fill(~seen, lowest).unsqueeze(1)


class _BehindBuffer(DynamicCache):
    """Keys and values (L, 2, B, H, P, D) of prefixes, which are only read; what a pass adds is in ``new``."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.buffer = buffer
        self.new: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.of_layer(layer_idx)
        self.add(key_states, value_states)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def of_layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefixes in one layer (B, H, P, D)."""
        keys, values = self.buffer[layer_idx]
        return keys, values

    def add(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keeps what a layer adds, in the order of the layers."""
        self.new.append(torch.stack([key_states, value_states]).detach())


@dataclass(frozen=True)
class StaticPass:
    """What a pass over B suffixes of S tokens gives; of each row only its own tokens mean anything.

    Attributes:
        states: (B, S + 1, d) the last hidden state of each prefix, and those of its suffix.
        gradient: (B, S, d) with respect to the suffixes' embeddings, zero behind a row's end; None if none was asked
            for.
        values: whatever the function of the states gave.
        new: (L, 2, B, H, S, D) keys and values of the suffixes.
        buffer: (L, 2, B, H, P, D) those of the prefixes.
        caches, sizes: of the prefixes, and of the suffixes.
    """

    states: Tensor
    gradient: Tensor | None
    values: Tensor
    new: Tensor
    buffer: Tensor
    caches: Sequence[KVCache | None]
    sizes: Sequence[int]

    def cache(self, row: int) -> KVCache:
        """The cache of a row's prefix and suffix together; a copy."""
        before, size = self.caches[row], self.sizes[row]
        begin = self.buffer.shape[-2] - (0 if before is None else len(before))
        both = torch.cat([self.buffer[:, :, row : row + 1, :, begin:], self.new[:, :, row : row + 1, :, :size]], dim=-2)
        hidden = self.states[row, 1 : 1 + size]
        return from_stacked(both, hidden.clone() if before is None else torch.cat([before.hidden, hidden]))


Value = Callable[..., tuple[Tensor, Tensor]]


class StaticBackbone:
    """Passes of a `Backbone` over suffixes behind cached prefixes, by captured graphs.

    Args:
        backbone: one that `why_not` has nothing to say about.
        value: maps (states, *arguments) to a number whose gradient is taken, and to values that are returned. It is
            captured.
        graphs: where its graphs are kept. They may be those of another `StaticBackbone` of the same model with the same
            ``value`` that is not used any more.
        compiled: its layers, compiled; None runs them as they are.
        watched: tensors that ``value`` reads and the model does not have.

    Attributes:
        counts: captures since it was made.
        compile_seconds: how long passes took in which something was compiled.
    """

    def __init__(
        self,
        backbone: Backbone,
        value: Value,
        graphs: Graphs,
        compiled: CompiledLayers | None = None,
        watched: tuple[Tensor, ...] = (),
    ) -> None:
        self.backbone, self.value, self.graphs, self.compiled = backbone, value, graphs, compiled
        self.counts = Counts()
        self.compile_seconds = 0.0
        self._config = backbone.model.config.get_text_config()
        self._last_position = (getattr(self._config, "max_position_embeddings", None) or 2**40) - 1
        graphs.begin((*backbone.model.parameters(), *backbone.model.buffers(), *watched), self.counts)
        for buffer in graphs.memory.values():
            buffer.zero_()  # a model that gave NaN may have left some, and zero times NaN is NaN

    def __call__(
        self,
        caches: Sequence[KVCache | None],
        inputs: Sequence[Inputs],
        arguments: Sequence[tuple[Sequence[Tensor], int | None]],
        *,
        gradient: bool,
    ) -> StaticPass:
        """Runs B suffixes of different lengths, each behind its cached prefix.

        Args:
            inputs: of each suffix, S_b tokens; the longest S_b is 1 or more.
            arguments: more tensors for ``value``: one per row, padded with zeros to this length, None for S + 1.
            gradient: whether the gradient with respect to the inputs' embeddings is wanted.

        Returns:
            The pass, whose tensors hold until the next call.

        Raises:
            CaptureError: if the pass cannot be captured.
            torch.OutOfMemoryError: if there is no room for it.
        """
        sizes = [len(x) for x in inputs]
        past = [0 if cache is None else len(cache) for cache in caches]
        rows, size = 1 << (len(inputs) - 1).bit_length(), bucket(max(sizes))
        columns = _COLUMNS if max(past) <= _COLUMNS else 1 << (max(past) - 1).bit_length()
        buffer, last = self._filled(caches, rows, columns)
        embeds = _padded([x.embeds for x in inputs], rows, size)
        more = [_padded(tensors, rows, width or size + 1) for tensors, width in arguments]
        device = embeds.device
        first = torch.tensor([columns - n for n in past] + [columns] * (rows - len(past))).to(device, non_blocking=True)
        key = (rows, size, columns, gradient, *((x.shape, x.dtype) for x in more))
        graph = self.graphs.get(key, in_place=1)
        function = partial(self._pass, gradient)
        results = self._timed(lambda: graph(function, buffer, first, last, embeds, *more))
        return StaticPass(*results, buffer, caches, sizes)  # type: ignore[call-arg]

    def _timed(self, call: Callable[[], Any]) -> Any:
        if self.compiled is None:
            return call()
        before, start = compiled_graphs(), time.perf_counter()
        with self.compiled.active():
            results = call()
        if compiled_graphs() > before:
            self.compile_seconds += time.perf_counter() - start
        return results

    def _pass(
        self, gradient: bool, buffer: Tensor, first: Tensor, last: Tensor, embeds: Tensor, *arguments: Tensor
    ) -> tuple[Any, ...]:
        """What is captured."""
        size, columns = embeds.shape[1], buffer.shape[-2]
        steps = torch.arange(size, device=embeds.device)
        cache = _BehindBuffer(buffer)
        masks = attention_masks(self._config, first, (columns + steps).unsqueeze(0), columns + size, embeds.dtype)
        positions = (columns - first).unsqueeze(1) + steps
        with torch.enable_grad() if gradient else torch.no_grad():
            x = embeds.detach().requires_grad_(gradient)
            hidden, _ = self.backbone.run(
                steps.expand(len(embeds), size),
                x,
                columns,
                attention_mask=masks,
                position_ids=positions.clamp(max=self._last_position),
                use_cache=True,
                **{self.backbone.cache_argument: cache},
            )
            states = torch.cat([last.unsqueeze(1), hidden], dim=1)
            total, values = self.value(states, *arguments)
            found = torch.autograd.grad(total, x)[0] if gradient else None
        return states.detach(), found, values.detach(), torch.stack(cache.new)

    def _filled(self, caches: Sequence[KVCache | None], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The buffer with the prefixes in it, and their last hidden states (rows, d)."""
        backbone, memory = self.backbone, self.graphs.memory
        prefixes = [(row, cache) for row, cache in enumerate(caches) if cache is not None]
        if (rows, columns) not in memory:
            example: Any = prefixes[0][1] if prefixes else None
            if example is None:
                first = embedded(backbone.embedding, checks.probe_ids(backbone.model)[:1])
                _, (example,) = backbone.extend([None], [first])
            _, heads, _, width = example.keys[0].shape
            memory[rows, columns] = example.keys[0].new_zeros(len(example.keys), 2, rows, heads, columns, width)
        buffer = memory[rows, columns]
        like = prefixes[0][1].hidden if prefixes else backbone.output(backbone.tried[:1])
        last = like.new_zeros(rows, like.shape[1])
        for row, cache in prefixes:
            buffer[:, :, row, :, columns - len(cache) :].copy_(stacked(cache)[:, :, 0])
            last[row] = cache.hidden[-1]
        return buffer, last


def stacked(cache: KVCache) -> Tensor:
    """Keys and values of all layers as one tensor (L, 2, 1, heads, T, head width)."""
    if cache.stacked is not None:
        return cache.stacked
    return torch.stack([torch.stack([k, v]) for k, v in zip(cache.keys, cache.values, strict=True)])


def from_stacked(both: Tensor, hidden: Tensor) -> KVCache:
    """A cache of keys and values (L, 2, 1, heads, T, head width) and hidden states (T, d); views."""
    keys, values = zip(*(layer.unbind() for layer in both.unbind()), strict=True)
    return KVCache(keys, values, hidden, both)


def _padded(rows: Sequence[Tensor], count: int, size: int) -> Tensor:
    """(count, size, ...) of rows (n_b, ...), zeros behind each and below."""
    out = rows[0].new_zeros(count, size, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row.detach()
    return out


# Whether a model can be run so

Pairs = list[tuple[str, Tensor, Tensor]]


def refusal(
    backbone: Backbone, kind: str, which: str, run: Callable[[Backbone, Inputs, list[KVCache]], Pairs]
) -> str | None:
    """Why a model cannot be run with masks and positions of our own, in one clause; None if it can. Tried once.

    Args:
        kind: names the answer among all that is found out about a model.
        which: passes these are, a word or two.
        run: runs them on eight tokens, behind caches of the first four and the first two, so that a window of three
            shows; gives results by name beside those of usual passes.
    """
    found: str | None = checks.remembered(backbone.model, backbone.name, kind, lambda: _examined(backbone, which, run))
    return found


def _examined(backbone: Backbone, which: str, run: Callable[[Backbone, Inputs, list[KVCache]], Pairs]) -> str | None:
    if backbone.cache_kind != "prefix":
        return "it does not run in batches behind prefixes"
    if "cache_position" in inspect.signature(backbone.module.forward).parameters:
        # It reads positions from columns, which a buffer or slots of constant size do not give.
        return "its forward pass takes one cache position for the whole batch"
    if len({weight.device for weight in backbone.model.parameters()}) > 1:
        return "its weights are on several devices, or off-loaded"
    config = backbone.model.config.get_text_config()
    if backbone.windowed and not checks.window_is_known(config):
        return "its layers have windows of a kind that is not known"
    with _small_window(config) if backbone.windowed else nullcontext():
        try:
            inputs = embedded(backbone.embedding, checks.probe_ids(backbone.model))
            caches: list[Any] = backbone.extend([None, None], [inputs[:4], inputs[:2]])[1]
            if len({x.shape for x in (*caches[0].keys, *caches[0].values)}) > 1:
                # One tensor has no room for them.
                return "its layers have keys and values of several sizes"
            for what, ours, theirs in run(backbone, inputs, caches):
                if not is_close(ours, theirs):
                    return f"{what} of passes {which} are {relative_error(ours, theirs):.2g} apart, relatively"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with a mask of four dimensions
            return f"a pass {which} raises {type(error).__name__}"
    return None


@contextmanager
def _small_window(config: Any) -> Iterator[None]:
    """In this block, a model's sliding windows are so short that the tokens of a check show them."""
    before = config.sliding_window
    config.sliding_window = 3
    try:
        yield
    finally:
        config.sliding_window = before


def why_not(backbone: Backbone) -> str | None:
    """Why passes of constant shapes are not for a model, in one clause; None if they are. Tried once per model."""
    if not backbone.supports_prefix_cache:
        return "it does not run in batches behind prefixes"
    if backbone.needs_ids:
        return "it reads token ids besides embeddings"
    return refusal(backbone, "static", "of constant shapes", _beside_usual)


def _beside_usual(backbone: Backbone, inputs: Inputs, caches: list[KVCache]) -> Pairs:
    """Results of a pass of constant shapes on a batch of two."""
    weights = torch.linspace(1, 2, caches[0].hidden.shape[1], device=inputs.device)

    def value(states: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        total = (states.float() * weights * inside.unsqueeze(-1)).pow(2).sum()
        return total, total

    suffixes = [inputs[4:], inputs[2:]]
    ones = [torch.ones(1 + len(x), device=inputs.device) for x in suffixes]
    static = StaticBackbone(backbone, value, Graphs(inputs.device))
    out = static(caches, suffixes, [(ones, None)], gradient=True)
    assert out.gradient is not None
    with torch.enable_grad():
        leaves = [x.differentiable() for x in suffixes]
        hidden, usual = backbone(caches, leaves)
        total = sum((h.float() * weights).pow(2).sum() for h in hidden)
        gradients = torch.autograd.grad(total, [x.embeds for x in leaves])  # type: ignore[arg-type]
    pairs = []
    for row, (x, cache) in enumerate(zip(suffixes, usual, strict=True)):
        assert isinstance(cache, KVCache)
        pairs += [
            ("hidden states", out.states[row, 1 : 1 + len(x)], hidden[row]),
            ("gradients", out.gradient[row, : len(x)], gradients[row]),
            ("keys", out.cache(row).keys[-1].flatten(0, -2), cache.keys[-1].flatten(0, -2)),
        ]
    return pairs
