"""Token-by-token decoding: a batch of sequences of different lengths, or one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nabla_fast.models.backbone import Backbone, Inputs, joined
from nabla_fast.models.kv_cache import KVCache, ModelCache

# Columns that buffers grow by at the least.
_ROOM = 64


class DecodeBatch:
    """Keys and values of B sequences, in buffers that tokens are appended to.

    Rows end in the same column. Columns before a shorter row, and of tokens that did not stay, are masked.

    Args:
        backbone: of a model that runs in batches behind prefixes.
        caches: one per sequence, of one token or more; copied.
    """

    def __init__(self, backbone: Backbone, caches: Sequence[KVCache]) -> None:
        self.backbone = backbone
        self.lengths = [len(cache) for cache in caches]
        self.width = max(self.lengths)
        # On the CPU, where it says which columns are a row's without waiting for the device.
        self.mask = torch.zeros(len(caches), self.width + _ROOM, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            self.mask[row, self.width - length : self.width] = True
        self.hidden = [[cache.hidden] for cache in caches]
        self._last: list[Tensor] = []
        layers = range(len(caches[0].keys))
        self._layers = [_Layer([(c.keys[i], c.values[i]) for c in caches], self.width) for i in layers]
        # Made without a config, because layers with a sliding window would forget; the masks still are theirs.
        self._cache = DynamicCache()
        self._cache.layers.extend(self._layers)

    @property
    def spread(self) -> float:
        """Columns in use per token of the longest sequence."""
        return self.width / max(self.lengths)

    @property
    def gaps(self) -> bool:
        """Whether a masked column lies within a sequence."""
        begins = self.mask.int().argmax(1).tolist()
        return any(self.width - begin > length for begin, length in zip(begins, self.lengths, strict=True))

    @torch.no_grad()
    def step(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden states (k_b, d) of each sequence's next k_b >= 1 tokens; `keep` says which of them stay."""
        sizes = [len(row) for row in tokens]
        size = max(sizes)
        if self.mask.shape[1] < self.width + size:
            self.mask = pad(self.mask, (0, size + _ROOM))
        ids = torch.zeros(len(tokens), size, dtype=torch.long)
        positions = torch.zeros(len(tokens), size, dtype=torch.long)
        for row, (new, length) in enumerate(zip(tokens, self.lengths, strict=True)):
            ids[row, : len(new)] = torch.tensor(new)
            self.mask[row, self.width : self.width + len(new)] = True
            # Padding repeats the last position, which every model has.
            positions[row] = length + torch.arange(size).clamp(max=len(new) - 1)
        device = self.backbone.device
        hidden, _ = self.backbone.run(
            ids.to(device),
            None,
            self.width,
            attention_mask=self.mask[:, : self.width + size].to(device).long(),
            position_ids=positions.to(device),
            use_cache=True,
            **{self.backbone.cache_argument: self._cache},
        )
        self._last = [hidden[row, :k] for row, k in enumerate(sizes)]
        return self._last

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens of the last `step`, the first ``counts[b]`` >= 1 of each sequence stay."""
        for row, (count, hidden) in enumerate(zip(counts, self._last, strict=True)):
            self.hidden[row].append(hidden[:count])
            self.lengths[row] += count
            self.mask[row, self.width + count :] = False
        self.width += max(counts)
        for layer in self._layers:
            # A step leaves it so, unless a draft was wrong.
            if layer.get_seq_length() != self.width:
                layer.use(self.width)
        self._last = []

    def row_cache(self, row: int) -> KVCache:
        """The cache of one sequence; a view where it has no gaps."""
        columns = self.mask[row, : self.width].nonzero()[:, 0]
        begin = int(columns[0])
        whole = len(columns) == self.width - begin
        # A copy of the columns for each device, not for each layer.
        places = {layer.device for layer in self._layers}
        used = {place: slice(begin, self.width) if whole else columns.to(place) for place in places}
        parts = [[x[row : row + 1, :, used[x.device]] for x in layer.buffers] for layer in self._layers]
        keys, values = zip(*parts, strict=True)
        return KVCache(keys, values, torch.cat(self.hidden[row]))


class DecodeSingle:
    """One sequence, decoded token by token, of a model that does not run in batches behind prefixes.

    Args:
        backbone: of a model that continues from its own cache, or else runs the whole sequence for every token.
        inputs: the tokens before the first new one.
        cache: of the first tokens of ``inputs``, or all; it stays as it is. None for nothing.

    Attributes:
        start: the cache of all ``inputs``, for a later sequence that begins with them; None where the model has none.
    """

    def __init__(self, backbone: Backbone, table: Any, inputs: Inputs, cache: ModelCache | None = None) -> None:
        self.backbone, self.table = backbone, table
        self.start: ModelCache | None = None
        self._inputs = inputs
        self._running: ModelCache | None = None
        if backbone.cache_kind == "state":
            if cache is None or len(cache) < len(inputs):
                (_,), (cache,) = backbone.extend([cache], [inputs[0 if cache is None else len(cache) :]])  # type: ignore[assignment]
            self.start = cache

    @torch.no_grad()
    def first(self) -> Tensor:
        """The hidden state (1, d) that predicts the first new token."""
        return self.backbone.whole(self._inputs)[-1:] if self.start is None else self.start.hidden

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """The hidden state (1, d) behind one more token."""
        ids = torch.tensor([token], device=self._inputs.device)
        if self.start is None:
            self._inputs = joined([self._inputs, self.table.inputs(ids)])
            return self.backbone.whole(self._inputs)[-1:]
        self._running = self.backbone.step(ids, self._running or self.start.copy())
        return self._running.hidden


class _Layer(DynamicLayer):
    """Keys and values of one layer, with room to the right. transformers' own layer copies all of them for every token.

    Args:
        rows: keys and values (1, heads, T_b, head width) of each sequence; they end in column ``width``.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]], width: int) -> None:
        super().__init__()
        self.buffers = [_stacked(part, width) for part in zip(*rows, strict=True)]
        self.dtype, self.device, self.is_initialized = self.buffers[0].dtype, self.buffers[0].device, True
        self.use(width)

    def use(self, width: int) -> tuple[Tensor, Tensor]:
        """The first ``width`` columns are in use."""
        keys, values = (x.narrow(2, 0, width) for x in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        begin, have = self.get_seq_length(), self.buffers[0].shape[2]
        end = begin + key_states.shape[2]
        if end > have:
            self.buffers = [pad(x, (0, 0, 0, max(end - have, have // 2))) for x in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, begin, end - begin).copy_(new)
        return self.use(end)


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    """One (B, heads, width + room, head width) of rows (1, heads, T_b, head width) that end in column ``width``."""
    _, heads, _, size = rows[0].shape
    out = rows[0].new_zeros(len(rows), heads, width + _ROOM, size)
    for row, x in enumerate(rows):
        out[row : row + 1, :, width - x.shape[2] : width] = x
    return out
