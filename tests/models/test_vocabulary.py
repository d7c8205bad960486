"""Alignment of two vocabularies by token string."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

from nabla_fast.models.language_model import EmbeddingTable
from nabla_fast.models.vocabulary import align, aligned_table
from nabla_fast.testing.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MISSING = ("ans", "what", "24")


def table(rows: int = V, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> EmbeddingTable:
    weight = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return EmbeddingTable(weight.to(dtype), scale)


def row(of: EmbeddingTable, token_id: int) -> Tensor:
    return of(torch.tensor(token_id))


def test_the_same_vocabulary_needs_no_copy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = align(TOKENIZER, tiny_tokenizer(), V, V)
    assert alignment.identical
    assert (alignment.share, alignment.unmatched) == (1.0, ())
    own = table(scale=3.0)
    ours = aligned_table(alignment, own, TOKENIZER, TOKENIZER)
    assert ours.weight.data_ptr() == own.weight.data_ptr()
    assert ours.scale == 3.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_order_of_the_same_strings_permutes_the_table(dtype: torch.dtype) -> None:
    other = tiny_tokenizer(shuffle=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = align(TOKENIZER, other, V, V)
    assert not alignment.identical
    assert alignment.share == 1.0
    own = table(dtype=dtype, scale=3.0)
    ours = aligned_table(alignment, own, TOKENIZER, other)
    assert ours.weight.dtype == dtype
    for token, i in TOKENIZER.get_vocab().items():
        assert alignment.partner[i] == other.get_vocab()[token]
        assert torch.equal(row(ours, i), row(own, other.get_vocab()[token]))


def test_missing_tokens_are_counted_and_warned_of_by_name() -> None:
    other = tiny_tokenizer(shuffle=5, missing=MISSING)
    with pytest.warns(UserWarning, match=rf"^3 of {V} tokens \({3 / V:.2%}\) have no partner") as caught:
        alignment = align(TOKENIZER, other, V, len(other))
    assert len(caught) == 1
    assert all(repr(token) in str(caught[0].message) for token in MISSING)
    assert alignment.share == pytest.approx(1 - 3 / V)
    assert set(alignment.unmatched) == set(MISSING)
    assert {TOKENIZER.convert_ids_to_tokens(i) for i in (alignment.partner < 0).nonzero().flatten().tolist()} == set(
        MISSING
    )


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_missing_tokens_get_the_mean_of_their_pieces() -> None:
    other = tiny_tokenizer(shuffle=5, missing=MISSING)
    own = table(len(other), scale=3.0)
    ours = aligned_table(align(TOKENIZER, other, V, len(other)), own, TOKENIZER, other)
    for token, pieces in (("ans", ("an", "s")), ("what", ("wh", "at")), ("24", ("2", "4"))):
        meant = torch.stack([row(own, other.get_vocab()[piece]) for piece in pieces]).mean(0)
        torch.testing.assert_close(row(ours, TOKENIZER.get_vocab()[token]), meant, rtol=0, atol=1e-14)
    assert torch.equal(row(ours, TOKENIZER.get_vocab()["wha"]), row(own, other.get_vocab()["wha"]))


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_mean_of_pieces_is_taken_wider_than_half_precision() -> None:
    other = tiny_tokenizer(missing=("ans",))
    own = table(len(other), torch.bfloat16)
    ours = aligned_table(align(TOKENIZER, other, V, len(other)), own, TOKENIZER, other)
    ids = [other.get_vocab()[piece] for piece in ("an", "s")]
    meant = own.weight[ids].double().mean(0).to(torch.bfloat16)
    assert torch.equal(row(ours, TOKENIZER.get_vocab()["ans"]), meant)


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_the_table_it_comes_from_is_left_as_it_is() -> None:
    other = tiny_tokenizer(missing=MISSING)
    own = table(len(other))
    before = own.weight.clone()
    aligned_table(align(TOKENIZER, other, V, len(other)), own, TOKENIZER, other)
    assert torch.equal(own.weight, before)


def test_vocabularies_are_close_with_nine_tenths_in_common() -> None:
    merged = [t for t in TOKENIZER.get_vocab() if len(t) > 1 and not t.startswith("<|")]
    few = tiny_tokenizer(missing=merged[: V // 10 + 1])
    with warnings.catch_warnings():
        # Who takes such a pair tells what it means.
        warnings.simplefilter("error")
        alignment = align(TOKENIZER, few, V, len(few))
    assert not alignment.close
    assert alignment.share == pytest.approx(len(few) / V)
    enough = tiny_tokenizer(missing=merged[: V // 10])
    with pytest.warns(UserWarning, match=re.escape(f"{V // 10} of {V} tokens")):
        assert align(TOKENIZER, enough, V, len(enough)).close


def test_padding_rows_of_the_reward_model_have_no_part() -> None:
    alignment = align(TOKENIZER, tiny_tokenizer(), V, 128)
    assert alignment.identical
    assert aligned_table(alignment, table(128), TOKENIZER, TOKENIZER).weight.shape == (V, 6)


def test_tokens_past_the_language_models_rows_have_no_part() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = align(TOKENIZER, tiny_tokenizer(missing=(" a", "+ ")), V - 4, V - 2)
    assert len(alignment.partner) == V - 4
    assert alignment.share == 1.0


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_reward_tokens_past_the_reward_models_rows_have_no_embedding() -> None:
    """A tokenizer can know tokens that its model was never resized for; here they are merged from smaller ones."""
    rows = V - 2
    alignment = align(TOKENIZER, TOKENIZER, V, rows)
    assert alignment.partner[rows:].tolist() == [-1, -1]
    assert alignment.share == pytest.approx(1 - 2 / V)
    ours = aligned_table(alignment, table(rows), TOKENIZER, TOKENIZER)
    assert torch.equal(ours.weight[:rows], table(rows).weight)
    assert ours.weight.isfinite().all()


def test_ids_without_a_token_get_no_partner_and_a_zero_row() -> None:
    """A language model's ids can have holes."""
    holes = tiny_tokenizer()
    vocabulary = holes.get_vocab()
    dropped = vocabulary.pop("ans")
    holes.get_vocab = lambda: vocabulary  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = align(holes, TOKENIZER, V, V)
    assert alignment.partner[dropped] == -1
    assert alignment.share == 1.0
