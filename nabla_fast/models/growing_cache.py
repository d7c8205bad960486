"""The KV cache of a batch that is being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nabla_fast.models.kv_cache import KVCache

# Columns that buffers grow by at the least.
ROOM = 64


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, with room to the right. transformers' own layer copies all of them for every token.

    Args:
        rows: keys and values (1, heads, T_b, head width) of each sequence; they end in column ``width``.

    Attributes:
        buffers: keys and values (B, heads, columns, head width), of which the first `get_seq_length` are in use.
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

    def reserve(self, size: int) -> int:
        """Makes room for ``size`` more columns; returns how many are in use."""
        begin, have = self.get_seq_length(), self.buffers[0].shape[2]
        if begin + size > have:
            self.buffers = [pad(x, (0, 0, 0, max(begin + size - have, have // 2))) for x in self.buffers]
        return begin

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        size = key_states.shape[2]
        begin = self.reserve(size)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, begin, size).copy_(new)
        return self.use(begin + size)


class GrowingCache(DynamicCache):
    """A `GrowingLayer` for each layer of a model.

    Made without a config, because layers with a sliding window would forget; the masks still are theirs.

    Args:
        caches: one per sequence; copied.
        width: the column that they end in.
    """

    layers: list[GrowingLayer]  # type: ignore[assignment]

    def __init__(self, caches: Sequence[KVCache], width: int) -> None:
        super().__init__()
        for i in range(len(caches[0].keys)):
            self.layers.append(GrowingLayer([(cache.keys[i], cache.values[i]) for cache in caches], width))

    def use(self, width: int) -> None:
        """The first ``width`` columns are in use."""
        for layer in self.layers:
            if layer.get_seq_length() != width:
                layer.use(width)


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    """One (B, heads, width + room, head width) of rows (1, heads, T_b, head width) that end in column ``width``."""
    _, heads, _, size = rows[0].shape
    out = rows[0].new_zeros(len(rows), heads, width + ROOM, size)
    for row, x in enumerate(rows):
        out[row : row + 1, :, width - x.shape[2] : width] = x
    return out
