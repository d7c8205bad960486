"""Drafts that a model makes itself, with weights of 8 bits: fewer exact passes, and the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from nabla_fast.config import Sampling
from nabla_fast.models.decode_batch import DecodeBatch
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.ops import native
from nabla_fast.rollout import HFRollout, Rollout, StopRule, hf, rollout, self_drafts
from nabla_fast.rollout.self_drafts import Record
from nabla_fast.sampling import Processors, Sampler
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing())),
    pytest.mark.usefixtures("one_thread"),
]
SAMPLING = Sampling(temperature=1.0, top_p=0.9)
NEVER = StopRule(frozenset())
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(dtype: torch.dtype = torch.float32) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.2)
    return LanguageModel(LlamaForCausalLM(config).to(dtype).eval(), tokenizer)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step of a batch was a rough one."""
    made: list[bool] = []
    own = DecodeBatch.step

    def step(self: DecodeBatch, tokens: Any, *, rough: bool = False) -> list[Tensor]:
        made.append(rough)
        return own(self, tokens, rough=rough)

    monkeypatch.setattr(DecodeBatch, "step", step)
    return made


def sequences(count: int = 4, limit: int = 24) -> list[Sequence]:
    prompts = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15, 16), (20, 21)]
    responses = [(), (30, 31), (), (8,)]
    return [Sequence(p, r, n, limit) for n, (p, r) in enumerate(zip(prompts, responses, strict=True))][:count]


def roll_out(
    model: LanguageModel, drafts: int, *, count: int = 4, limit: int = 24, sampling: Sampling = SAMPLING,
    stop: StopRule = NEVER, sampler: Any = None,
) -> list[Rollout]:  # fmt: skip
    return rollout(HFRollout(model, sampler or Sampler(), draft_tokens=drafts), sequences(count, limit), sampling, stop)


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(temperature=0.0)], ids=["sampled", "greedy"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("end", [(), (3, 4, 5, 30, 31)])
def test_tokens_and_latents_are_those_without_drafts(
    sampling: Sampling, count: int, end: tuple[int, ...], steps: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf.TOKENS_PER_PASS, "cpu", 16)
    model, stop = model_of(), StopRule(frozenset(end))
    plain = roll_out(model, 0, count=count, sampling=sampling, stop=stop)
    assert True not in steps
    drafted = roll_out(model, 8, count=count, sampling=sampling, stop=stop)
    assert True in steps
    for a, b in zip(plain, drafted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-4)
        assert b.calls + b.accepted == len(b.tokens)
    accepted, made = sum(b.accepted for b in drafted), sum(b.drafted for b in drafted)
    assert 0.6 * made < accepted <= made, "8 bits foresee most, also where random weights make ties"
    assert sum(b.calls for b in drafted) < 0.8 * sum(a.calls for a in plain)


def test_a_cache_that_is_kept_holds_exact_keys_and_values() -> None:
    model = model_of()
    kept = []
    for drafts in (0, 8):
        (sequence,) = sequences(1)
        sequence.language_cache = model.new_cache(sequence.prompt_ids)
        (drawn,) = rollout(HFRollout(model, draft_tokens=drafts), [sequence], SAMPLING, NEVER)
        assert drawn.cache is not None
        kept.append(drawn.cache)
    for one, other in zip((*kept[0].keys, *kept[0].values), (*kept[1].keys, *kept[1].values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_make_no_drafts_of_their_own(dtype: torch.dtype, steps: list[bool]) -> None:
    roll_out(model_of(dtype), 8)
    assert steps
    assert True not in steps


def test_no_draft_reaches_past_an_end_or_the_limit(steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    (free,) = roll_out(model, 0, count=1)
    tokens = free.tokens.tolist()
    stop = StopRule(frozenset({tokens[5]}))
    fed: list[int] = []
    own = DecodeBatch.step

    def step(self: DecodeBatch, given: Any, *, rough: bool = False) -> list[Tensor]:
        fed.extend(new[0] for new in given if rough)
        return own(self, given, rough=rough)

    monkeypatch.setattr(DecodeBatch, "step", step)
    (ended,) = roll_out(model, 8, count=1, stop=stop)
    assert ended.tokens.tolist() == tokens[: tokens.index(tokens[5]) + 1]
    assert tokens[5] not in fed, "nothing is drafted behind an end"
    for limit in (1, 2, 5):
        steps.clear()
        fed.clear()
        (short,) = roll_out(model, 8, count=1, limit=limit)
        assert short.tokens.tolist() == tokens[:limit]
        assert len(fed) == max(0, limit - 1)


def test_criteria_are_asked_for_the_response_alone() -> None:
    """They may count their calls."""
    model = model_of()
    seen: list[list[int]] = []

    def criterion(ids: list[int]) -> bool:
        seen.append(ids)
        return len(seen) == 9

    asked = []
    for drafts in (0, 8):
        seen.clear()
        (drawn,) = roll_out(model, drafts, count=1, stop=StopRule(frozenset(), criteria=(criterion,)))
        asked.append((drawn.tokens.tolist(), [list(ids) for ids in seen]))
    assert asked[0] == asked[1]
    assert len(asked[0][0]) == 9


def test_text_that_is_followed_for_long_is_drafted_from_there(steps: list[bool]) -> None:
    model = model_of()
    (free,) = roll_out(model, 0, count=1, limit=60)
    steps.clear()
    (sequence,) = sequences(1, 60)
    sequence.drawn = [tuple(free.tokens.tolist())]
    (again,) = rollout(HFRollout(model, draft_tokens=8), [sequence], SAMPLING, NEVER)
    assert again.tokens.tolist() == free.tokens.tolist()
    assert 0 < steps.count(True) <= 14, "the first tokens are the model's own drafts"
    assert steps.count(False) <= 12


def test_drafts_stop_where_nothing_can_be_drawn(steps: list[bool]) -> None:
    """What a rough pass makes impossible is for the exact pass to say."""
    model, own, rough = model_of(), Sampler(), [False]

    def sampler(logits: Tensor, *more: Any) -> Tensor:
        if rough[0] and len(logits) == 1 and steps[-1]:
            raise FloatingPointError("nothing can be drawn")
        return own(logits, *more)

    (plain,) = roll_out(model, 0, count=1)
    rough[0] = True
    (drawn,) = roll_out(model, 8, count=1, sampler=sampler)
    assert True in steps
    assert drawn.tokens.tolist() == plain.tokens.tolist()
    assert drawn.drafted == 0


def test_processors_see_drafts_as_they_see_responses() -> None:
    """Processors of the caller's decide about drafts, too."""

    class NoRepeats(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
            scores[:, input_ids[0, -3:]] = -torch.inf
            return scores

    class Own(Sampler):
        def processors(self, sequence: Sequence) -> Processors:
            return Processors([NoRepeats()], [], [])

    model = model_of()
    (plain,) = roll_out(model, 0, count=1, sampler=Own())
    (drawn,) = roll_out(model, 8, count=1, sampler=Own())
    tokens = plain.tokens.tolist()
    assert drawn.tokens.tolist() == tokens
    assert not any(token in tokens[max(0, n - 3) : n] for n, token in enumerate(tokens))
    assert drawn.accepted > 0.8 * drawn.drafted > 0


@pytest.mark.parametrize(("right", "rows", "expected"), [(98, 1, 7), (90, 1, 3), (50, 1, 0), (98, 4, 7)])
def test_lengths_follow_what_proved_right(right: int, rows: int, expected: int) -> None:
    record = Record(right, 100)
    found = record.length(7, rows)
    assert abs(found - expected) <= 1
    assert record.length(2, rows) <= 2
    assert record.length(0, rows) == 0


def test_the_record_counts_what_a_draft_has_shown() -> None:
    record = Record(0, 0)
    record.add(3, 5)  # the fourth was wrong, the fifth says nothing
    assert (record.right, record.seen) == (3, 4)
    record.add(5, 5)
    assert (record.right, record.seen) == (8, 9)
    record.add(0, 2)
    assert (record.right, record.seen) == (8, 10)


def test_a_model_that_is_drafted_badly_is_left_alone(steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 8 bits that say something else, drafts are given up, and the tokens stay."""
    model = model_of()
    plain = roll_out(model, 0, count=1, limit=60)
    steps.clear()
    own: Callable[..., Tensor] = LanguageModel.rough_logits
    monkeypatch.setattr(LanguageModel, "rough_logits", lambda self, hidden: -own(self, hidden))
    drawn = roll_out(model, 8, count=1, limit=60)
    assert drawn[0].tokens.tolist() == plain[0].tokens.tolist()
    assert 0 < steps.count(True) < 20
    assert not any(steps[-20:])


def test_the_best_length_grows_with_what_is_right() -> None:
    lengths = [self_drafts._best_length(percent, 16, 1) for percent in range(0, 101, 5)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 16
