"""Sequences decoded together: every hidden state is the full forward's, whatever joins, leaves or is undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.models.decode_batch import DecodeBatch
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.sequence_cache import extended
from nabla_fast.testing.models import FAMILIES, tiny_language_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22]]


def whole(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return hidden


def prefilled(ours: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[KVCache]:
    none = [torch.empty(0, dtype=torch.long)] * len(prompts)
    return extended(ours.backbone, ours.embedding, [ours.new_cache(p) for p in prompts], none)


def assert_state(state: KVCache, model: Any, ours: LanguageModel, tokens: Sequence[int], tolerance: float) -> None:
    torch.testing.assert_close(state.hidden, whole(model, tokens), rtol=0, atol=tolerance)
    (meant,) = prefilled(ours, [tokens])
    for part, other in ((state.keys, meant.keys), (state.values, meant.values)):
        for layer, (a, b) in enumerate(zip(part, other, strict=True)):
            assert a.shape == b.shape, layer
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_full_forward_and_rows_come_and_go(family: str) -> None:
    model = tiny_language_model(family)
    ours = LanguageModel(model, tiny_tokenizer())
    sequences = [list(p) for p in PROMPTS]
    batch = DecodeBatch(ours.backbone, prefilled(ours, sequences))
    for step in range(6):
        if step == 3:
            # Out of order, a row left out and a new one in its place.
            joined = [30, 31, 32, 33]
            batch = DecodeBatch(ours.backbone, [batch.row_cache(2), batch.row_cache(0), *prefilled(ours, [joined])])
            sequences = [sequences[2], sequences[0], joined]
        tokens = [[(7 * step + 11 * row) % 50] for row in range(3)]
        sequences = [[*s, *t] for s, t in zip(sequences, tokens, strict=True)]
        for hidden, so_far in zip(batch.step(tokens), sequences, strict=True):
            torch.testing.assert_close(hidden, whole(model, so_far)[-1:], rtol=0, atol=1e-9)
        batch.keep([1, 1, 1])
    for row, so_far in enumerate(sequences):
        assert_state(batch.row_cache(row), model, ours, so_far, 1e-9)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma2", "gemma3")])
def test_tokens_that_do_not_stay_leave_no_trace(family: str) -> None:
    model = tiny_language_model(family)
    ours = LanguageModel(model, tiny_tokenizer())
    sequences = [list(p) for p in PROMPTS]
    batch = DecodeBatch(ours.backbone, prefilled(ours, sequences))
    assert not batch.gaps
    for step in range(4):
        tokens = [[(5 * step + 3 * row + i) % 50 for i in range(1 + (row + step) % 3)] for row in range(3)]
        for hidden, so_far, new in zip(batch.step(tokens), sequences, tokens, strict=True):
            torch.testing.assert_close(hidden, whole(model, [*so_far, *new])[-len(new) :], rtol=0, atol=1e-9)
        kept = [max(1, len(new) - step % 2) for new in tokens]
        batch.keep(kept)
        sequences = [[*s, *t[:k]] for s, t, k in zip(sequences, tokens, kept, strict=True)]
    assert batch.gaps
    assert batch.spread > 1
    for row, so_far in enumerate(sequences):
        assert_state(batch.row_cache(row), model, ours, so_far, 1e-9)


def test_what_all_rows_undo_costs_no_columns() -> None:
    model = tiny_language_model("llama")
    ours = LanguageModel(model, tiny_tokenizer())
    batch = DecodeBatch(ours.backbone, prefilled(ours, [[5, 6, 7]]))
    batch.step([[8, 9, 10, 11]])
    batch.keep([2])
    assert (batch.width, batch.spread, batch.gaps) == (5, 1.0, False)
    (hidden,) = batch.step([[12]])
    torch.testing.assert_close(hidden, whole(model, [5, 6, 7, 8, 9, 12])[-1:], rtol=0, atol=1e-9)


def test_buffers_grow() -> None:
    model = tiny_language_model("llama")
    ours = LanguageModel(model, tiny_tokenizer())
    batch = DecodeBatch(ours.backbone, prefilled(ours, [[5, 6], [7]]))
    more = [i % 50 for i in range(90)]
    for i in range(0, 90, 10):
        batch.step([more[i : i + 10]] * 2)
        batch.keep([10, 10])
    assert_state(batch.row_cache(1), model, ours, [7, *more], 1e-9)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_padding_is_harmless_with_eager_attention(family: str) -> None:
    """In float32: transformers' own eager attention gives NaN for left padding in float64."""
    model = tiny_language_model(family, dtype=torch.float32)
    model.set_attn_implementation("eager")
    ours = LanguageModel(model, tiny_tokenizer())
    batch = DecodeBatch(ours.backbone, prefilled(ours, PROMPTS))
    for hidden, tokens in zip(batch.step([[1], [2], [3]]), ([*p, i + 1] for i, p in enumerate(PROMPTS)), strict=True):
        torch.testing.assert_close(hidden, whole(model, tokens)[-1:], rtol=0, atol=1e-4)


def test_decoding_needs_no_gradient() -> None:
    model = tiny_language_model("llama")
    ours = LanguageModel(model, tiny_tokenizer())
    batch = DecodeBatch(ours.backbone, prefilled(ours, PROMPTS))
    assert not batch.step([[1], [2], [3]])[0].requires_grad
