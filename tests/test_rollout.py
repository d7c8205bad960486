"""Rollouts with the transformers model: stops, latents, batches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_language_model, tiny_tokenizer

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.rollout import HFRollout, Start, StopRule, rollout
from nabla_fast.sampling import Context

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
NEVER = StopRule(frozenset())


def contexts(limit=8):
    prompts = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15, 16), (20, 21)]
    responses = [(), (30, 31), (), (8,)]
    return [Context(p, r, seed, limit) for seed, (p, r) in enumerate(zip(prompts, responses, strict=True))]


def roll_out(backend, contexts, sampling=SAMPLING, stop=NEVER):
    return rollout(backend, [Start(context) for context in contexts], sampling, stop)


@pytest.mark.filterwarnings("error::FutureWarning")  # an argument that transformers has renamed
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_the_full_forwards_hidden_states(family):
    model = LanguageModel(tiny_language_model(family), tiny_tokenizer())
    for context, drawn in zip(contexts(), roll_out(HFRollout(model), contexts()), strict=True):
        assert len(drawn.tokens) == 8 - len(context.response)
        ids = [*context.prompt_ids, *context.response, *drawn.tokens.tolist()]
        hidden = model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        first = len(context.prompt_ids) + len(context.response)
        torch.testing.assert_close(drawn.latents, hidden[first - 1 : -1], rtol=1e-6, atol=1e-6)


def test_a_rollout_does_not_depend_on_the_batch_or_its_order():
    backend = HFRollout(LanguageModel(tiny_language_model("qwen3"), tiny_tokenizer()))
    stop = StopRule(frozenset({3, 4, 5, 30, 31}))
    together = [r.tokens.tolist() for r in roll_out(backend, contexts(20), SAMPLING, stop)]
    assert len({len(tokens) for tokens in together}) > 1, "all ended at once, so no row ever left the batch"
    assert [r.tokens.tolist() for r in roll_out(backend, contexts(20)[::-1], SAMPLING, stop)] == together[::-1]
    for context, tokens in zip(contexts(20), together, strict=True):
        assert roll_out(backend, [context], SAMPLING, stop)[0].tokens.tolist() == tokens


def test_a_sequence_that_has_ended_is_left_as_it_is():
    backend = HFRollout(LanguageModel(tiny_language_model("llama"), tiny_tokenizer()))
    ended = [Context((5,), (3,), 0, 8), Context((5,), tuple(range(10, 18)), 0, 8)]
    for drawn in roll_out(backend, ended, SAMPLING, StopRule(frozenset({3}))):
        assert drawn.tokens.shape == (0,)
        assert drawn.latents.shape == (0, 24)


def test_an_end_token_in_the_prompt_does_not_stop_the_response():
    backend = HFRollout(LanguageModel(tiny_language_model("llama"), tiny_tokenizer()))
    (drawn,) = roll_out(backend, [Context((5, 3), (), 0, 4)], SAMPLING, StopRule(frozenset({3})))
    assert len(drawn.tokens) > 0


def test_a_stop_string_may_be_split_over_tokens_and_must_be_complete():
    tokenizer = tiny_tokenizer()
    stop = StopRule(frozenset(), ("user = 12",), tokenizer)
    ids = tokenizer("the user = 1")["input_ids"]
    more = tokenizer("the user = 12")["input_ids"]

    def ended(response):
        return stop.ended(Context((5,), tuple(response), 0, 99))

    assert not ended(ids)
    assert ended(more)
    assert not ended(())
    assert not any(ended(more[:n]) for n in range(len(more)))


def test_criteria_see_prompt_and_response():
    seen = []
    stop = StopRule(frozenset(), criteria=(lambda ids: bool(seen.append(ids)) or len(ids) == 4,))
    assert not stop.ended(Context((5, 6), (7,), 0, 99))
    assert stop.ended(Context((5, 6), (7, 8), 0, 99))
    assert seen == [[5, 6, 7], [5, 6, 7, 8]]
