"""Token-by-token decoding: a batch of sequences of different lengths, or one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nabla_fast.models.backbone import Backbone, Inputs, joined
from nabla_fast.models.growing_cache import ROOM, GrowingCache
from nabla_fast.models.kv_cache import KVCache, ModelCache
from nabla_fast.models.native_layers import NativeLayers
from nabla_fast.models.token_layers import MOST_TOKENS
from nabla_fast.ops.token_layers import DecoderLayers


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
        self.mask = torch.zeros(len(caches), self.width + ROOM, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            self.mask[row, self.width - length : self.width] = True
        self.hidden = [[cache.hidden] for cache in caches]
        self._last: list[Tensor] = []
        self._cache = GrowingCache(caches, self.width)
        self.native: NativeLayers | None = backbone.native
        # As the model was in the first step; with weights of 8 bits, as it was in the first rough one.
        self._native_layers: DecoderLayers | None = None
        self._rough_layers: DecoderLayers | None = None

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
    def step(self, tokens: Sequence[Sequence[int]], *, rough: bool = False) -> list[Tensor]:
        """The hidden states (k_b, d) of each sequence's next k_b >= 1 tokens; `keep` says which of them stay.

        Args:
            rough: whether weights may be rounded to 8 bits, as for a draft.
        """
        sizes = [len(row) for row in tokens]
        size = max(sizes)
        if self.mask.shape[1] < self.width + size:
            self.mask = pad(self.mask, (0, size + ROOM))
        ids = torch.zeros(len(tokens), size, dtype=torch.long)
        positions = torch.zeros(len(tokens), size, dtype=torch.long)
        for row, (new, length) in enumerate(zip(tokens, self.lengths, strict=True)):
            ids[row, : len(new)] = torch.tensor(new)
            self.mask[row, self.width : self.width + len(new)] = True
            # Padding repeats the last position, which every model has.
            positions[row] = length + torch.arange(size).clamp(max=len(new) - 1)
        native = self._native_weights() if len(tokens) * size <= MOST_TOKENS else None
        if native is not None:
            hidden = self._run_natively(ids, positions, native, rough)
        else:
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

    def _native_weights(self) -> DecoderLayers | None:
        """The weights of all layers, for one call; None if there is none that computes them."""
        if self._native_layers is None and self.native is not None:
            self._native_layers = self.native.weights(self.backbone.module)
            if self._native_layers is None:
                self.native = None
        return self._native_layers

    def _run_natively(self, ids: Tensor, positions: Tensor, layers: DecoderLayers, rough: bool) -> Tensor:
        assert self.native is not None
        size = ids.shape[1]
        mask = None
        if size > 1 or len(ids) > 1 or self.lengths[0] < self.width:
            mask = self.mask[:, None, None, : self.width + size]
            if size > 1:  # no token sees what comes after it
                mask = mask.repeat(1, 1, size, 1)
                mask[..., self.width :] &= torch.ones(size, size, dtype=torch.bool).tril()
        if rough and layers.weights[0].dtype is torch.float32:
            layers = self._rough_layers = self._rough_layers or self.native.rounded(layers)
        hidden = self.native.run(self.backbone.module, ids, positions, mask, self._cache, layers)
        return self.backbone.output(hidden)

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens of the last `step`, the first ``counts[b]`` >= 1 of each sequence stay."""
        for row, (count, hidden) in enumerate(zip(counts, self._last, strict=True)):
            self.hidden[row].append(hidden[:count])
            self.lengths[row] += count
            self.mask[row, self.width + count :] = False
        self.width += max(counts)
        self._cache.use(self.width)
        self._last = []

    def forget(self, steps: int) -> None:
        """Undoes the last ``steps`` >= 1 steps, of each of which one token of each sequence stayed."""
        self.mask[:, self.width - steps : self.width] = False
        self.width -= steps
        self.lengths = [length - steps for length in self.lengths]
        for hidden in self.hidden:
            del hidden[-steps:]
        self._cache.use(self.width)

    def row_cache(self, row: int) -> KVCache:
        """The cache of one sequence; a view where it has no gaps."""
        columns = self.mask[row, : self.width].nonzero()[:, 0]
        begin = int(columns[0])
        whole = len(columns) == self.width - begin
        # A copy of the columns for each device, not for each layer.
        places = {layer.device for layer in self._cache.layers}
        used = {place: slice(begin, self.width) if whole else columns.to(place) for place in places}
        parts = [[x[row : row + 1, :, used[x.device]] for x in layer.buffers] for layer in self._cache.layers]
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
