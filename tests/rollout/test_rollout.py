"""Rollouts with the transformers model: stops, latents, batches."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.rollout import HFRollout, StopRule, hf, rollout
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import FAMILIES, tiny_language_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
NEVER = StopRule(frozenset())


def sequences(limit=8):
    prompts = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15, 16), (20, 21)]
    responses = [(), (30, 31), (), (8,)]
    return [Sequence(p, r, seed, limit) for seed, (p, r) in enumerate(zip(prompts, responses, strict=True))]


def roll_out(backend, sequences, sampling=SAMPLING, stop=NEVER):
    return rollout(backend, sequences, sampling, stop)


@pytest.mark.filterwarnings("error::FutureWarning")  # an argument that transformers has renamed
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_the_full_forwards_hidden_states(family):
    model = LanguageModel(tiny_language_model(family), tiny_tokenizer())
    for sequence, drawn in zip(sequences(), roll_out(HFRollout(model), sequences()), strict=True):
        assert len(drawn.tokens) == 8 - len(sequence.prefix)
        ids = [*sequence.prompt_ids, *sequence.prefix, *drawn.tokens.tolist()]
        hidden = model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        first = len(sequence.prompt_ids) + len(sequence.prefix)
        torch.testing.assert_close(drawn.latents, hidden[first - 1 : -1], rtol=1e-6, atol=1e-6)


def test_a_rollout_does_not_depend_on_the_batch_or_its_order():
    backend = HFRollout(LanguageModel(tiny_language_model("qwen3"), tiny_tokenizer()))
    stop = StopRule(frozenset({3, 4, 5, 30, 31}))
    together = [r.tokens.tolist() for r in roll_out(backend, sequences(20), SAMPLING, stop)]
    assert len({len(tokens) for tokens in together}) > 1, "all ended at once, so no row ever left the batch"
    assert [r.tokens.tolist() for r in roll_out(backend, sequences(20)[::-1], SAMPLING, stop)] == together[::-1]
    for sequence, tokens in zip(sequences(20), together, strict=True):
        assert roll_out(backend, [sequence], SAMPLING, stop)[0].tokens.tolist() == tokens


def test_a_sequence_that_has_ended_is_left_as_it_is():
    backend = HFRollout(LanguageModel(tiny_language_model("llama"), tiny_tokenizer()))
    ended = [Sequence((5,), (3,), 0, 8), Sequence((5,), tuple(range(10, 18)), 0, 8)]
    for drawn in roll_out(backend, ended, SAMPLING, StopRule(frozenset({3}))):
        assert drawn.tokens.shape == (0,)
        assert drawn.latents.shape == (0, 24)


def test_an_end_token_in_the_prompt_does_not_stop_the_response():
    backend = HFRollout(LanguageModel(tiny_language_model("llama"), tiny_tokenizer()))
    (drawn,) = roll_out(backend, [Sequence((5, 3), (), 0, 4)], SAMPLING, StopRule(frozenset({3})))
    assert len(drawn.tokens) > 0


def test_a_stop_string_may_be_split_over_tokens_and_must_be_complete():
    tokenizer = tiny_tokenizer()
    stop = StopRule(frozenset(), ("user = 12",), tokenizer)
    ids = tokenizer("the user = 1")["input_ids"]
    more = tokenizer("the user = 12")["input_ids"]

    def ended(response):
        return stop.ended(Sequence((5,), (), 0, 99), tuple(response))

    assert not ended(ids)
    assert ended(more)
    assert not ended(())
    assert not any(ended(more[:n]) for n in range(len(more)))


def test_criteria_see_prompt_and_response():
    seen = []
    stop = StopRule(frozenset(), criteria=(lambda ids: bool(seen.append(ids)) or len(ids) == 4,))
    sequence = Sequence((5, 6), (), 0, 99)
    assert not stop.ended(sequence, (7,))
    assert stop.ended(sequence, (7, 8))
    assert seen == [[5, 6, 7], [5, 6, 7, 8]]


def earlier_responses(drawn):
    """Of each sequence: nonsense, or what it drew with a hole in it."""
    right = [tuple(d.tokens.tolist()) for d in drawn]
    return [((8, 9, 8, 9, 8, 9), right[0]), ((30, 31, *right[1][:5], 9, *right[1][6:]),), (), (right[3][1:],)]


@pytest.fixture
def room(monkeypatch):
    """For drafts, in batches too."""
    monkeypatch.setitem(hf.TOKENS_PER_PASS, "cpu", 64)


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(temperature=0.0)], ids=["sampled", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_the_number_of_calls_and_nothing_else(family, sampling, room):
    model = LanguageModel(tiny_language_model(family), tiny_tokenizer())
    stop = StopRule(frozenset({3, 4}))
    plain = roll_out(HFRollout(model), sequences(24), sampling, stop)
    known = sequences(24)
    for sequence, earlier in zip(known, earlier_responses(plain), strict=True):
        sequence.language_cache, sequence.drawn = model.new_cache(sequence.prompt_ids), list(earlier)
    drafted = rollout(HFRollout(model, draft_tokens=5), known, sampling, stop)
    for a, b, sequence in zip(plain, drafted, sequences(), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-9, atol=1e-9)
        assert a.calls == len(a.tokens)
        assert (a.drafted, a.accepted) == (0, 0)
        # Each call gives one token of its own besides the draft tokens that proved right.
        assert b.calls + b.accepted == len(b.tokens)
        ids = [*sequence.prompt_ids, *sequence.prefix, *b.tokens.tolist()[:-1]]
        torch.testing.assert_close(b.cache.hidden, whole(model, ids), rtol=1e-6, atol=1e-6)
    assert sum(b.drafted for b in drafted) > sum(b.accepted for b in drafted) > 0
    assert sum(b.calls for b in drafted) < sum(len(b.tokens) for b in drafted)


def whole(model, ids):
    return model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def test_a_draft_never_passes_the_limit():
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    (whole_one,) = roll_out(HFRollout(model), [Sequence((5, 6), (), 0, 20)])
    positions = []

    def hear(_, __, given):
        positions.append(int(given["position_ids"].max()))

    hook = model.model.base_model.register_forward_pre_hook(hear, with_kwargs=True)
    shorter = Sequence((5, 6), (), 0, 10, drawn=[tuple(whole_one.tokens.tolist())])
    (drawn,) = rollout(HFRollout(model, draft_tokens=8), [shorter], SAMPLING, NEVER)
    hook.remove()
    assert drawn.tokens.tolist() == whole_one.tokens[:10].tolist()
    assert drawn.accepted > 5
    # Two of the prompt and ten of the response, of which the last is never fed.
    assert max(positions) == 10


def test_a_large_batch_leaves_no_room_for_drafts():
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    many = [Sequence((5, 6), (), seed, 6, drawn=[(7,) * 6]) for seed in range(5)]
    drawn = {n: rollout(HFRollout(model, draft_tokens=8), many[:n], SAMPLING, NEVER) for n in (1, 2, 3, 5)}
    for n in (3, 5):
        assert sum(r.drafted for r in drawn[n]) == 0, "room for less than two tokens is not used"
    assert 0 < sum(r.drafted for r in drawn[2]) <= 2 * 5 * 3, "three tokens beside the last in each pass"
    assert drawn[1][0].drafted > 5


def test_a_stop_string_within_a_draft_ends_the_response():
    tokenizer = tiny_tokenizer()
    model = LanguageModel(tiny_language_model("llama"), tokenizer)
    backend = HFRollout(model, draft_tokens=8)
    (free,) = roll_out(backend, [Sequence((5, 6), (), 0, 20)])
    tokens = tuple(free.tokens.tolist())
    text = tokenizer.decode(tokens[:6])
    stop = StopRule(frozenset(), (text[-3:],), tokenizer)
    (plain,) = roll_out(HFRollout(model), [Sequence((5, 6), (), 0, 20)], stop=stop)
    (drafted,) = rollout(backend, [Sequence((5, 6), (), 0, 20, drawn=[tokens])], SAMPLING, stop)
    assert drafted.tokens.tolist() == plain.tokens.tolist() == list(tokens[: len(plain.tokens)])
    assert 0 < len(plain.tokens) <= 6
    assert drafted.calls < plain.calls


def test_sequences_may_be_submitted_while_others_are_under_way():
    model = LanguageModel(tiny_language_model("qwen3"), tiny_tokenizer())
    stop = StopRule(frozenset({3, 4, 5, 30, 31}))
    alone = [roll_out(HFRollout(model), [c], stop=stop)[0].tokens.tolist() for c in sequences(20)]
    stream = HFRollout(model).open(SAMPLING, stop)
    four = sequences(20)
    waiting = four[2:]
    ended = {}
    stream.submit(four[0])
    stream.submit(four[1])
    while len(ended) < 4:
        ended.update(stream.collect())
        if waiting:
            stream.submit(waiting.pop())
    assert [ended[sequence].tokens.tolist() for sequence in four] == alone
    assert stream.collect() == []


def test_a_rollout_goes_on_from_a_cache_and_leaves_it_alone():
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    prompt = (5, 6, 7, 8)
    sequence = Sequence(prompt, (), 0, 9, language_cache=model.new_cache(prompt))
    (first,) = rollout(HFRollout(model), [sequence], SAMPLING, NEVER)
    cache = model.new_cache(prompt)
    cache.keep(first.tokens[:-1], first.cache)
    response = (*first.tokens[:3].tolist(), 40)
    (alone,) = roll_out(HFRollout(model), [Sequence(prompt, response, 0, 9)])
    fed = []
    before = (cache.tokens.clone(), cache.cache)
    body = model.model.base_model
    hook = body.register_forward_pre_hook(
        lambda _, __, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    (resumed,) = rollout(HFRollout(model), [Sequence(prompt, response, 0, 9, language_cache=cache)], SAMPLING, NEVER)
    hook.remove()
    assert resumed.tokens.tolist() == alone.tokens.tolist()
    torch.testing.assert_close(resumed.latents, alone.latents, rtol=1e-9, atol=1e-9)
    # Nothing but the changed token and those drawn after it.
    assert fed == [1] * len(resumed.tokens)
    assert torch.equal(cache.tokens, before[0])
    assert cache.cache is before[1]


def test_a_model_that_gives_nan_is_named():
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    with torch.no_grad():
        model.model.base_model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="response position 0"):
        roll_out(HFRollout(model), [Sequence((5, 6), (), 0, 4)])
