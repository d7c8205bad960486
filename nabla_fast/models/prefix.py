"""Forward passes of a decoder's body that go on from the keys and values of a prefix (identity (c) of the design).

Prompt and committed tokens need no gradient. Their keys and values are computed once, without autograd; forward and
backward then run over the tokens behind them, and give what the whole sequence would.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nabla_fast import ops

# Tokens up to which a forward pass takes about as long as of one: reading the weights, and on a GPU launching kernels,
# is what takes the time. On a CPU that ends soon (`benchmarks/test_bench_rollouts.py`).
TOKENS_PER_PASS = {"cpu": 8, "cuda": 256}
_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}
# Their frequencies depend on the longest position of a call, so a token's keys do too.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class PrefixState:
    """Keys and values of a sequence's first T tokens, and the hidden states behind them.

    Attributes:
        keys, values: per layer (1, heads, T, head width); rotary embeddings are applied.
        hidden: (T, d) last hidden states.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def crop(self, length: int) -> PrefixState:
        """The state of the first ``length`` tokens; a view."""
        if length >= len(self):
            return self
        keys, values = (tuple(x[:, :, :length] for x in part) for part in (self.keys, self.values))
        return PrefixState(keys, values, self.hidden[:length])


class Body:
    """A decoder without its head, whose calls go on from prefixes where that is exact.

    Args:
        model: a transformers model in ``eval()`` with a ``base_model``.
        name: what warnings call it.

    Attributes:
        incremental: whether a call may begin behind a prefix. If not, every call takes whole sequences.
        windowed: whether a layer's attention reaches back a fixed number of columns, gaps among them.

    Warns:
        UserWarning: once per model that is not incremental, with the reason.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        reason = _why_whole(model)
        self.incremental = reason is None
        self.windowed = _has_windows(model.config.get_text_config())
        if reason is not None:
            _warn(model, f"{name} takes whole sequences for every gradient, slower: {reason}")

    def __call__(
        self, states: Sequence[PrefixState | None], embeds: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[PrefixState | None]]:
        """Runs B ragged suffixes, each behind its prefix.

        Args:
            states: the prefix of each; None for nothing.
            embeds: (S_b, d) input embeddings, S_b >= 1; gradients flow to them and not to the prefixes.

        Returns:
            The last hidden states (S_b, d) of each suffix; the states of prefix and suffix together, without graph
            (None unless incremental).
        """
        if not self.incremental:
            # Alone: some of these models are not independent of what else is in the batch.
            return [self._whole(x) for x in embeds], [None] * len(embeds)
        hidden, after = self.extend(states, embeds)
        return hidden, list(after)

    def extend(
        self, states: Sequence[PrefixState | None], embeds: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[PrefixState]]:
        """The same, behind the prefixes whether or not the model is ``incremental``: as it generates text."""
        past = [0 if state is None else len(state) for state in states]
        sizes = [len(x) for x in embeds]
        cache = _Continuation(states, max(past))
        mask, positions = _layout(past, sizes, embeds[0].device)
        out = self.model.base_model(
            inputs_embeds=pad_sequence(list(embeds), batch_first=True),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self.model.base_model): cache},
        )
        hidden = [out.last_hidden_state[row, :size] for row, size in enumerate(sizes)]
        after = [
            cache.row(row, max(past) - past[row], max(past) + size, state, hidden[row].detach())
            for row, (size, state) in enumerate(zip(sizes, states, strict=True))
        ]
        return hidden, after

    def _whole(self, embeds: Tensor) -> Tensor:
        mask = torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device)
        positions = torch.arange(len(embeds), device=embeds.device).unsqueeze(0)
        out = self.model.base_model(
            inputs_embeds=embeds.unsqueeze(0), attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def cache_argument(model: Any) -> str:
    """What the model's forward pass calls its cache of keys and values; transformers 5.24 gave it a new name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Track:
    """What one model has made of one sequence: everything before the response, and the response up to a token.

    Args:
        opening: (P, d) embeddings before the response, P >= 1.

    Attributes:
        tokens: (k,) int64 response tokens that ``state`` covers.
        state: of P + k tokens; None before the first pass.
    """

    def __init__(self, opening: Tensor) -> None:
        self.opening = opening
        self.tokens = torch.empty(0, dtype=torch.long, device=opening.device)
        self.state: PrefixState | None = None

    def keep(self, tokens: Tensor, state: PrefixState | None) -> None:
        """Remembers ``state``, of which only what the opening and ``tokens`` (k,) cover is kept."""
        if state is None:
            return
        length = len(self.opening) + len(tokens)
        self.tokens, self.state = tokens, state.crop(length)

    def crop(self, length: int) -> None:
        """Forgets response tokens from ``length`` on."""
        self.keep(self.tokens[:length], self.state)


def resume(body: Body, table: Any, tracks: Sequence[Track], responses: Sequence[Tensor]) -> list[PrefixState]:
    """The state of each track's opening and response, without autograd; the tracks stay as they are.

    What a track has in common with its response is taken from it; what is missing then is run in one batch, or alone
    where the model is not `incremental`.

    Args:
        table: maps token ids (n,) to embeddings (n, d).
        responses: (n_b,) int64 each.
    """
    if not body.incremental:
        whole = [torch.cat([track.opening, table(y)]) for track, y in zip(tracks, responses, strict=True)]
        with torch.no_grad():
            return [body.extend([None], [embeds])[1][0] for embeds in whole]
    states: list[PrefixState | None] = []
    missing = []
    for track, common, response in zip(tracks, common_lengths(tracks, responses), responses, strict=True):
        rest = table(response[common:])
        states.append(None if track.state is None else track.state.crop(len(track.opening) + common))
        missing.append(rest if track.state is not None else torch.cat([track.opening, rest]))
    behind = [i for i, rest in enumerate(missing) if len(rest)]
    if behind:
        with torch.no_grad():
            _, after = body.extend([states[i] for i in behind], [missing[i] for i in behind])
        for i, state in zip(behind, after, strict=True):
            states[i] = state
    return [state for state in states if state is not None]


def catch_up(
    body: Body, table: Any, tracks: Sequence[Track], responses: Sequence[Tensor], starts: Sequence[int]
) -> list[int]:
    """Brings each track to the first ``starts[b]`` tokens of its response, or almost; see `resume`.

    Returns:
        How many tokens of its response each track covers: ``starts[b]``, or fewer where the rest costs less as a part
        of the pass that follows than as a pass of its own.
    """
    known = [response[:start] for response, start in zip(responses, starts, strict=True)]
    covered = common_lengths(tracks, known)
    most = TOKENS_PER_PASS.get(known[0].device.type, 0)
    far = [
        i for i, (t, y) in enumerate(zip(tracks, known, strict=True)) if t.state is None or len(y) - covered[i] > most
    ]
    for i in set(range(len(tracks))) - set(far):
        tracks[i].crop(covered[i])
    if far:
        states = resume(body, table, [tracks[i] for i in far], [known[i] for i in far])
        for i, state in zip(far, states, strict=True):
            tracks[i].keep(known[i], state)
            covered[i] = len(known[i])
    return covered


def common_lengths(tracks: Sequence[Track], responses: Sequence[Tensor]) -> list[int]:
    """How many leading tokens each track shares with its response; one read by the host."""
    width = min(max(len(t.tokens) for t in tracks), max(len(r) for r in responses))
    if width == 0:
        return [0] * len(tracks)
    old, new = (
        torch.stack([pad(x[:width], (0, width - min(len(x), width)), value=filler) for x in rows])
        for rows, filler in (([t.tokens for t in tracks], -1), (responses, -2))
    )
    first: list[int] = ops.token_diff(old, new)[0].tolist()
    return first


class _Continuation(DynamicCache):
    """Left-padded prefixes of a batch, which stay as they are: `update` answers with prefix and new tokens together.

    Made without a config, because layers with a sliding window would forget; the masks still are theirs.
    """

    def __init__(self, states: Sequence[PrefixState | None], past: int) -> None:
        super().__init__()
        self.after: dict[int, tuple[Tensor, Tensor]] = {}
        first = next((state for state in states if state is not None), None)
        for layer in range(0 if first is None else len(first.keys)):
            assert first is not None
            keys = _left_padded([s.keys[layer] if s else None for s in states], first.keys[layer], past)
            values = _left_padded([s.values[layer] if s else None for s in states], first.values[layer], past)
            # What an update makes, without its copies.
            made: Any = DynamicLayer()
            made.keys, made.values, made.is_initialized = keys, values, True
            made.dtype, made.device = keys.dtype, keys.device
            self.layers.append(made)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = key_states, value_states
        if layer_idx < len(self.layers):
            old: Any = self.layers[layer_idx]
            keys, values = torch.cat([old.keys, keys], dim=-2), torch.cat([old.values, values], dim=-2)
        self.after[layer_idx] = keys.detach(), values.detach()
        return keys, values

    def row(self, row: int, begin: int, end: int, before: PrefixState | None, hidden: Tensor) -> PrefixState:
        """What one row has become: positions [begin, end) of it are no padding."""
        parts = [self.after[layer] for layer in range(len(self.after))]
        # Copies: a view would keep the whole batch alive.
        alone = parts[0][0].shape[0] == 1 and begin == 0
        cut = [[x[row : row + 1, :, begin:end] for x in part] for part in parts]
        keys, values = zip(*((k, v) if alone else (k.clone(), v.clone()) for k, v in cut), strict=True)
        return PrefixState(keys, values, hidden.clone() if before is None else torch.cat([before.hidden, hidden]))


def _left_padded(rows: Sequence[Tensor | None], like: Tensor, length: int) -> Tensor:
    """One (B, heads, length, width) of rows (1, heads, T_b, width), zeros before each."""
    full = [like[:, :, :0] if row is None else row for row in rows]
    padded = [row if row.shape[2] == length else pad(row, (0, 0, length - row.shape[2], 0)) for row in full]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _layout(past: Sequence[int], sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mask (B, P + S) and positions (B, S) of left-padded prefixes with right-padded suffixes behind them."""
    before, size = (torch.tensor(x, device=device).unsqueeze(1) for x in (past, sizes))
    columns = torch.arange(max(past), device=device)
    steps = torch.arange(max(sizes), device=device)
    mask = torch.cat([columns >= max(past) - before, steps < size], dim=1)
    # Padding repeats the last position, which every model has.
    return mask.long(), before + torch.minimum(steps.unsqueeze(0), size - 1)


_REASONS: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
_WARNED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _warn(model: Any, message: str) -> None:
    if model not in _WARNED:
        _WARNED[model] = True
        warnings.warn(message, stacklevel=4)


def _why_whole(model: Any) -> str | None:
    """Why suffixes behind a prefix would not give what whole sequences give; None if they do."""
    if model not in _REASONS:
        _REASONS[model] = _known_reason(model.config.get_text_config()) or _measured_reason(model)
    return _REASONS[model]


def _has_windows(config: Any) -> bool:
    layers = getattr(config, "layer_types", None)
    return "sliding_attention" in layers if layers else bool(getattr(config, "sliding_window", None))


def _known_reason(config: Any) -> str | None:
    """What six tokens would not show."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            return f"its rotary embeddings ({parameters['rope_type']}) depend on the length of the sequence"
    other = set(getattr(config, "layer_types", None) or ()) - _CAUSAL_LAYERS
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional"
    return None


@torch.no_grad()
def _measured_reason(model: Any) -> str | None:
    """Compares six tokens at once with three and then three."""
    weight = model.get_input_embeddings().weight
    embeds = model.get_input_embeddings()(torch.arange(min(6, len(weight)), device=weight.device))
    body = Body.__new__(Body)
    body.model, body.incremental = model, True
    whole = body._whole(embeds)
    try:
        _, states = body([None], [embeds[:3]])
        (behind,), _ = body(states, [embeds[3:]])
    except Exception as error:  # whatever a model without such a cache raises
        return f"it does not go on from keys and values ({type(error).__name__}: {error})"
    tolerance = 0.1 if whole.dtype in (torch.bfloat16, torch.float16) else 1e-3
    largest = float(whole.float().abs().nan_to_num(0).max())
    if not torch.allclose(behind.float(), whole[3:].float(), rtol=0, atol=tolerance * largest, equal_nan=True):
        return "six tokens at once and three after three give it different hidden states"
    return None
