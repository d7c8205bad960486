"""Decoding passes of constant shapes: each sequence has a slot of keys and values, which is written in place.

Keys and values of a slot are left-aligned: column c holds position c. What differs from step to step (how long each
sequence is, which tokens it feeds) is in tensors on the device, so that a pass can be captured in a graph. Columns
behind a sequence's end hold whatever was there before; no query sees them before they are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nabla_fast.models.backbone import Backbone, Inputs
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.static import Pairs, attention_masks, from_stacked, refusal, stacked


class SlotCache(DynamicCache):
    """Keys and values of B slots, which an update writes in place and returns whole.

    Args:
        kv: (L, 2, B, heads, T, head width).
        columns: (B, K) int64, where the K new keys and values of each slot go.
    """

    def __init__(self, kv: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.kv, self.columns = kv, columns

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.kv[layer_idx, 0], self.kv[layer_idx, 1]
        index = self.columns[:, None, :, None].expand_as(key_states)
        keys.scatter_(2, index, key_states)
        values.scatter_(2, index, value_states)
        return keys, values


def run(backbone: Backbone, kv: Tensor, columns: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """The last hidden states (B, K, d) of K more tokens of each slot, whose keys and values are written to ``kv``.

    Args:
        kv: (L, 2, B, heads, T, head width); what lies before a slot's first new column is read.
        columns: (B, K) int64, the columns of the new tokens, one behind the other.
        positions: (B, K) int64, their positions: the columns, but for tokens that do not count and might have
            positions that the model does not take.
        ids: (B, K) int64 token ids.
    """
    first = torch.zeros_like(columns[:, 0])
    hidden, _ = backbone.run(
        ids,
        None,
        0,
        attention_mask=attention_masks(backbone.model.config.get_text_config(), first, columns, kv.shape[-2], kv.dtype),
        position_ids=positions,
        use_cache=True,
        **{backbone.cache_argument: SlotCache(kv, columns)},
    )
    return hidden


def write(kv: Tensor, slot: int, cache: KVCache) -> None:
    """Copies the T' keys and values of a cache into the first T' columns of a slot."""
    kv[:, :, slot, :, : len(cache)].copy_(stacked(cache)[:, :, 0])


def read(kv: Tensor, slot: int, size: int, hidden: Tensor) -> KVCache:
    """A cache of the first ``size`` columns of a slot, copied, and of ``hidden`` (size, d), as it is."""
    return from_stacked(kv[:, :, slot : slot + 1, :, :size].clone(), hidden)


def why_not(backbone: Backbone) -> str | None:
    """Why a model cannot be run in slots, in one clause; None if it can. Tried once per model."""
    return refusal(backbone, "slots", "over slots", _beside_usual)


@torch.no_grad()
def _beside_usual(backbone: Backbone, inputs: Inputs, caches: list[KVCache]) -> Pairs:
    """Results of passes over two slots, the first of which feeds tokens that prove wrong: the second one writes their
    columns again."""
    ids = inputs.ids
    hidden, after = backbone.extend(caches, [inputs[4:7], inputs[2:5]])
    _, heads, _, width = caches[0].keys[0].shape
    kv = caches[0].keys[0].new_zeros(len(caches[0].keys), 2, 2, heads, 16, width)
    for slot, cache in enumerate(caches):
        write(kv, slot, cache)
    begin = torch.tensor([[4], [2]], device=ids.device)
    columns = begin + torch.arange(3, device=ids.device)
    run(backbone, kv, columns, columns, torch.stack([ids[[4, 0, 1]], ids[[2, 7, 6]]]))
    again = columns[:, :2] + 1
    one = run(backbone, kv, columns[:, :1], columns[:, :1], ids[columns[:, :1]])
    two = run(backbone, kv, again, again, ids[again])
    pairs = [("hidden states", ours, theirs) for ours, theirs in zip(torch.cat([one, two], dim=1), hidden, strict=True)]
    for slot, usual in enumerate(after):
        assert isinstance(usual, KVCache)
        keys = kv[-1, 0, slot, :, : len(usual)]
        pairs.append(("keys", keys.flatten(0, -2), usual.keys[-1].flatten(0, -2)))
    return pairs
