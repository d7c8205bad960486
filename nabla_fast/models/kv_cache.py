"""KV caches of the first tokens of sequences.

Prompt and committed tokens need no gradient. Their keys and values are computed once, without autograd. Forward and
backward passes then run over the tokens behind them alone, and give what the whole sequence would: in a causal model,
nothing before a token depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a sequence's first T tokens, and their last hidden states.

    Attributes:
        keys, values: per layer (1, heads, T, head width); rotary embeddings are applied.
        hidden: (T, d) last hidden states.
        stacked: keys and values as one tensor (L, 2, 1, heads, T, head width) of which they are views, if there is one.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden: Tensor
    stacked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def crop(self, length: int) -> KVCache:
        """The cache of the first ``length`` tokens; a view."""
        if length >= len(self):
            return self
        keys, values = (tuple(x[:, :, :length] for x in part) for part in (self.keys, self.values))
        both = None if self.stacked is None else self.stacked[..., :length, :]
        return KVCache(keys, values, self.hidden[:length], both)


@dataclass(frozen=True)
class ModelCache:
    """A cache of a model's own class for a sequence's first T tokens, such as a recurrent state.

    Attributes:
        cache: what the model returned; copied before a pass continues from it.
        argument: its name among the arguments of the forward pass.
        length: T.
        hidden: (1, d) the last hidden state.
    """

    cache: Any
    argument: str
    length: int
    hidden: Tensor

    def __len__(self) -> int:
        return self.length

    def copy(self) -> ModelCache:
        """A copy, for a pass that changes it in place."""
        return replace(self, cache=deepcopy(self.cache))

    @contextmanager
    def differentiable(self) -> Iterator[ModelCache]:
        """A copy that passes in this block may change in place, also where autograd saves its tensors.

        Recurrent layers read their state and then overwrite it; what autograd saves of it is cloned.
        """
        copies: dict[int, Any] = {}
        own = replace(self, cache=deepcopy(self.cache, copies))
        places = {x.untyped_storage().data_ptr() for x in copies.values() if isinstance(x, Tensor)}

        def kept(x: Tensor) -> Tensor:
            return x.clone() if x.untyped_storage().data_ptr() in places else x

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            yield own

    def crop(self, length: int) -> ModelCache | None:
        """Itself if it has no more than ``length`` tokens, else None: an earlier recurrent state is lost."""
        return self if length >= self.length else None


class PaddedCache(DynamicCache):
    """The caches of a batch of prefixes, left-padded to one length. `update` leaves them as they are and returns prefix
    and new tokens together.

    Made without a config, because layers with a sliding window would forget; the masks still are theirs.
    """

    def __init__(self, caches: Sequence[KVCache | None], past: int) -> None:
        super().__init__()
        self.after: dict[int, tuple[Tensor, Tensor]] = {}
        first = next((cache for cache in caches if cache is not None), None)
        for layer, (k, v) in enumerate(() if first is None else zip(first.keys, first.values, strict=True)):
            # The layer that an update would make, without its copies.
            made: Any = DynamicLayer()
            made.keys = _left_padded([c.keys[layer] if c else None for c in caches], k, past)
            made.values = _left_padded([c.values[layer] if c else None for c in caches], v, past)
            made.dtype, made.device, made.is_initialized = k.dtype, k.device, True
            self.layers.append(made)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = key_states, value_states
        if layer_idx < len(self.layers):
            old: Any = self.layers[layer_idx]
            keys, values = torch.cat([old.keys, keys], dim=-2), torch.cat([old.values, values], dim=-2)
        self.after[layer_idx] = keys.detach(), values.detach()
        return keys, values

    def row(self, row: int, begin: int, end: int, before: KVCache | None, hidden: Tensor) -> KVCache:
        """The cache of one row after the pass, of its columns [begin, end), which are no padding."""
        parts = [self.after[layer] for layer in range(len(self.after))]
        # Copies: a view would keep the whole batch alive.
        alone = parts[0][0].shape[0] == 1 and begin == 0
        cut = [[x[row : row + 1, :, begin:end] for x in part] for part in parts]
        keys, values = zip(*((k, v) if alone else (k.clone(), v.clone()) for k, v in cut), strict=True)
        return KVCache(keys, values, hidden.clone() if before is None else torch.cat([before.hidden, hidden]))


def _left_padded(rows: Sequence[Tensor | None], like: Tensor, length: int) -> Tensor:
    """One (B, heads, length, width) of rows (1, heads, T_b, width), zeros before each."""
    full = [like[:, :, :0] if row is None else row for row in rows]
    padded = [row if row.shape[2] == length else pad(row, (0, 0, length - row.shape[2], 0)) for row in full]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def layout(past: Sequence[int], sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mask (B, P + S) and positions (B, S) of left-padded prefixes with right-padded suffixes behind them.

    Padding on the right is not masked: no token sees what comes after it, and a batch without prefixes needs no mask.
    """
    before, size = (torch.tensor(x, device=device).unsqueeze(1) for x in (past, sizes))
    columns = torch.arange(max(past), device=device)
    steps = torch.arange(max(sizes), device=device)
    seen = torch.ones(len(sizes), len(steps), dtype=torch.bool, device=device)
    mask = torch.cat([columns >= max(past) - before, seen], dim=1)
    # Padding repeats the last position, which every model has.
    return mask.long(), before + torch.minimum(steps.unsqueeze(0), size - 1)
