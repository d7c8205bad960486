"""Rollouts from vLLM, against a server in this process that can be made to fail in every way."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import vllm_cases
from fake_vllm import Answerer, serving
from vllm_cases import GREEDY, NEVER, SAMPLING, SEQUENCES, draw, make

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.sequence_cache import catch_up
from nabla_fast.rollout import RolloutError, StopRule, rollout
from nabla_fast.rollout.engine import TokenRequest
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    CONTEXT,
    FAMILIES,
    tiny_language_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
model, server, backend = vllm_cases.model, vllm_cases.server, vllm_cases.backend  # fixtures


def hidden_states(model, ids):
    return model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vllm-")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [False, True])
def test_latents_and_caches_are_the_full_forwards(family, cached):
    model = LanguageModel(tiny_language_model(family), tiny_tokenizer())
    sequences, caches = SEQUENCES, []
    if cached:
        caches = [model.new_cache(s.prompt_ids) for s in SEQUENCES]
        # One knows its prompt alone, one more than has been asked for, one a response that went another way.
        known = [torch.tensor(ids, dtype=torch.long) for ids in ([], [30, 31], [40, 41, 42], [8])]
        catch_up(model.backbone, model.embedding, caches, known, [len(ids) for ids in known])
        sequences = [replace(s, language_cache=cache) for s, cache in zip(SEQUENCES, caches, strict=True)]
    before = [(c.tokens.tolist(), c.cache.hidden.clone()) for c in caches]
    with serving(Answerer(model.model, tiny_tokenizer())) as fake:
        drawn = rollout(make(model, fake), sequences, SAMPLING, NEVER)
    for sequence, result in zip(SEQUENCES, drawn, strict=True):
        new = result.tokens.tolist()
        assert len(new) == 8 - len(sequence.prefix) == len(result.latents) == result.calls - 1
        hidden = hidden_states(model, [*sequence.prompt_ids, *sequence.prefix, *new])
        first = len(sequence.prompt_ids) + len(sequence.prefix)
        torch.testing.assert_close(result.latents, hidden[first - 1 : -1], rtol=1e-6, atol=1e-6)
        assert result.cache is not None
        torch.testing.assert_close(result.cache.hidden, hidden[:-1], rtol=1e-6, atol=1e-6)
    for cache, (tokens, hidden) in zip(caches, before, strict=True):
        assert cache.tokens.tolist() == tokens
        assert torch.equal(cache.cache.hidden, hidden), "a rollout changed the cache it began from"


def test_a_model_without_prefix_caches_gives_latents_all_the_same(model, server):
    backend = make(model, server)
    model.backbone.supports_prefix_cache, model.backbone.cache_kind = False, "whole"
    (result,) = rollout(backend, SEQUENCES[1:2], SAMPLING, NEVER)
    hidden = hidden_states(model, [9, 30, 31, *result.tokens.tolist()])
    torch.testing.assert_close(result.latents, hidden[2:-1], rtol=1e-6, atol=1e-6)
    assert result.cache is None


def test_a_cache_that_covers_everything_needs_no_further_pass(model, server, monkeypatch):
    backend = make(model, server)
    cache = model.new_cache((9,))
    tokens = torch.tensor([30, 31])
    catch_up(model.backbone, model.embedding, [cache], [tokens], [2])
    monkeypatch.setattr(model.backbone, "extend", None)
    (result,) = rollout(backend, [Sequence((9,), (30, 31), 1, 3, language_cache=cache)], SAMPLING, NEVER)
    torch.testing.assert_close(result.latents, cache.cache.hidden[2:3])


def test_greedy_is_the_models_own_choice(backend, model):
    for sequence, result in zip(SEQUENCES, rollout(backend, SEQUENCES, GREEDY, NEVER), strict=True):
        assert model.logits(result.latents).argmax(-1).tolist() == result.tokens.tolist()
        assert len(result.tokens) == sequence.limit - len(sequence.prefix)


def test_tokens_depend_on_seed_and_position_alone(backend, server):
    together = draw(backend)
    assert draw(backend, SEQUENCES[::-1]) == together[::-1]
    seeds = {request["seed"] for request in server.requests[:4]}
    assert {request["seed"] for request in server.requests} == seeds
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)

    def seed(sequence, response):
        return TokenRequest.of(sequence, response, SAMPLING, NEVER).parameters["seed"]

    ours = seed(SEQUENCES[0], ())
    assert ours != seed(Sequence((5, 6, 7), (), 0, 8), (1,))
    assert ours != seed(Sequence((5, 6, 7), (), 1, 8), ())


def test_the_request_leaves_nothing_to_the_servers_defaults(backend, server):
    stop = StopRule(frozenset({3, 4}), ("so",), tiny_tokenizer())
    draw(backend, SEQUENCES[1:2], Sampling(0.7, top_p=0.9, top_k=5), stop)
    (asked,) = server.requests
    expected = {"model": "tiny", "prompt": [9, 30, 31], "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    expected |= {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    expected |= {"stop": ["so"], "stop_token_ids": [3, 4], "include_stop_str_in_output": True, "ignore_eos": True}
    expected |= {"skip_special_tokens": False, "return_token_ids": True, "stream": True, "min_tokens": 0}
    assert {name: asked[name] for name in expected} == expected


def test_the_models_generation_config_on_the_server_changes_nothing(model, server):
    expected = draw(make(model, server))
    server.defaults = {"temperature": 5.0, "top_p": 0.1, "top_k": 1, "min_p": 0.5, "repetition_penalty": 1.3}
    server.defaults |= {"presence_penalty": 1.0, "frequency_penalty": 1.0, "min_tokens": 5, "max_tokens": 2}
    assert draw(make(model, server)) == expected


# What ends a response


def test_an_end_token_in_the_prompt_does_not_stop_the_response(backend, server):
    server.answerer.forced = (30, 31, 32)
    assert draw(backend, [Sequence((5, 3), (), 0, 3)], stop=StopRule(frozenset({3}))) == [[30, 31, 32]]


def test_an_immediate_end_token_is_the_whole_response(backend, server, model):
    server.answerer.forced = (3, 30)
    (result,) = rollout(backend, SEQUENCES[:1], SAMPLING, StopRule(frozenset({3})))
    assert result.tokens.tolist() == [3]
    torch.testing.assert_close(result.latents, hidden_states(model, [5, 6, 7])[-1:])


def test_a_sequence_that_has_ended_is_left_as_it_is(backend, server):
    ended = [Sequence((5,), (3,), 0, 8), Sequence((5,), tuple(range(10, 18)), 0, 8)]
    for result in rollout(backend, ended, SAMPLING, StopRule(frozenset({3}))):
        assert result.tokens.shape == (0,)
        assert result.latents.shape == (0, 24)
        assert result.calls == 0
    assert not server.requests


def test_the_servers_end_token_is_none_unless_the_stop_rule_says_so(backend, server):
    server.answerer.forced = (3, 30, 3, 31)
    assert draw(backend, [Sequence((5,), (), 0, 4)]) == [[3, 30, 3, 31]]


def test_a_stop_string_may_be_split_over_tokens_and_stays_in_the_response(backend, server):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the user = 12 and")["input_ids"]
    server.answerer.forced = ids
    stop = StopRule(frozenset(), ("user = 12",), tokenizer)
    (tokens,) = draw(backend, [Sequence((5,), (), 0, 40)], stop=stop)
    assert tokenizer.decode(tokens) == "the user = 12"
    assert len(server.requests) == 1


def test_a_stop_string_may_begin_in_what_is_there_already(backend, server):
    tokenizer = tiny_tokenizer()
    before, after = (tuple(tokenizer(text)["input_ids"]) for text in ("a user", " = 12 and so on"))
    server.answerer.forced = after
    stop = StopRule(frozenset(), ("user = 12",), tokenizer)
    (tokens,) = draw(backend, [Sequence((5,), before, 0, 40)], stop=stop)
    assert tokenizer.decode(tokens) == " = 12"


def test_criteria_cut_the_answer(backend):
    stop = StopRule(frozenset(), criteria=(lambda ids: len(ids) == 6,))
    assert [len(tokens) for tokens in draw(backend, SEQUENCES, stop=stop)] == [3, 3, 8, 3]


def test_a_response_ends_where_the_context_does_and_a_longer_one_is_refused(backend, server):
    prompt = tuple(10 + i % 50 for i in range(CONTEXT - 3))
    (tokens,) = draw(backend, [Sequence(prompt, (), 0, 3)])
    assert len(tokens) == 3
    asked = len(server.requests)
    with pytest.raises(RolloutError, match=rf"takes {CONTEXT} tokens.*a prompt of {CONTEXT - 3}.*need {CONTEXT + 1}"):
        draw(backend, [Sequence(prompt, (), 0, 4)])
    assert len(server.requests) == asked


# Fewer tokens than asked


def test_an_answer_that_stops_short_is_continued(backend, server):
    whole = draw(backend, sampling=GREEDY)
    server.answerer.cap = 3
    server.requests.clear()
    assert draw(backend, sampling=GREEDY) == whole
    lengths = sorted(request["max_tokens"] for request in server.requests)
    assert lengths == [1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8]
    assert len({request["seed"] for request in server.requests}) == 11


def test_a_server_that_gives_nothing_or_next_to_nothing_is_an_error(backend, server):
    server.answerer.cap = 0
    with pytest.raises(RolloutError, match="finish_reason None"):
        draw(backend, SEQUENCES[:1])
    server.answerer.cap = 1
    with pytest.raises(RolloutError, match=r"gave 32 tokens in 32 requests .* it must give up to 40 unless"):
        draw(backend, [Sequence((5,), (), 0, 40)])


# Trouble with the server


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "error"])
def test_what_fails_is_tried_again(backend, server, fault):
    expected = draw(backend)
    server.faults, server.requests = [fault, None, fault], []
    assert draw(backend) == expected
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "answers HTTP 500 to /v1/completions: out of order"),
        ("cut", "broke off"),
        ("error", r"broke off \(EngineCore encountered an issue\), 3 attempts"),
    ],
)
def test_what_fails_for_ever_is_an_error(backend, server, fault, message):
    server.faults, server.faulty_forever = [fault], True
    with pytest.raises(RolloutError, match=message) as caught:
        draw(backend, SEQUENCES[:1])
    assert server.url in str(caught.value)
    assert len(server.requests) == 3, "one attempt, and two more"


def test_a_bad_request_is_not_tried_again(backend, server):
    server.faults, server.faulty_forever = [400], True
    with pytest.raises(RolloutError, match="HTTP 400"):
        draw(backend, SEQUENCES[:1])
    assert len(server.requests) == 1


def test_a_slow_answer_is_waited_for_and_silence_is_not(model, server):
    server.pause = 0.02
    backend = make(model, server, timeout=0.7, retries=1)
    began = time.monotonic()
    draw(backend, [Sequence((5,), (), 0, 40)])
    assert time.monotonic() - began > 0.7, "the whole answer takes longer than the silence that is borne"
    server.faults, server.faulty_forever = ["silent"], True
    with pytest.raises(RolloutError, match=r"gave no sign of life for 0\.7 s, 1 attempt;"):
        draw(backend, SEQUENCES[:1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tokens", r"gave 9 tokens and more where max_tokens is 8"),
        ("pings", r"gave no token for 0\.3 s, 1 attempt"),
        ("line", r"sends a line of more than 1048576 bytes; it must be that of a vLLM server"),
        *((fault, r"gave no token for 0\.3 s, 1 attempt") for fault in ("chunk", "size", "trailer")),
        ("head", r"gave no sign of life for 0\.3 s, 1 attempt"),
        ("no json", r"broke off \(\[1\]\), 3 attempts"),
    ],
)
def test_an_answer_that_never_ends_is_given_up(model, server, fault, message):
    backend = make(model, server, timeout=0.3)
    server.faults, server.faulty_forever = [fault], True
    began = time.monotonic()
    with pytest.raises(RolloutError, match=message):
        draw(backend, SEQUENCES[:1])
    assert time.monotonic() - began < 5
    wait_for(lambda: not threads())


def test_a_server_that_dies_is_an_error_and_what_had_been_collected_stays(backend, server):
    server.gate[SEQUENCES[0].prompt_ids] = threading.Event()
    with closing(backend.open(SAMPLING, NEVER)) as stream:
        stream.submit(SEQUENCES[0])
        stream.submit(SEQUENCES[2])
        ((sequence, result),) = stream.collect()
        assert sequence is SEQUENCES[2]
        assert len(result.tokens) == 8
        server.die()
        with pytest.raises(RolloutError, match=r"vllm_url '.*' cannot be reached \(.*refused.*\), 3 attempts"):
            stream.collect()


def test_ids_outside_the_vocabulary_and_answers_without_ids_are_errors(backend, server, model):
    server.answerer.forced = (30, model.vocab_size)
    with pytest.raises(RolloutError, match=f"gave token {model.vocab_size}; .* has tokens 0 to {model.vocab_size - 1}"):
        draw(backend, [Sequence((5,), (), 0, 2)])
    server.faults = ["no ids"]
    with pytest.raises(RolloutError, match=r"returns no token_ids; it must be .* vLLM server, 0\.10\.2 or later"):
        draw(backend, SEQUENCES[:1])


def test_a_local_model_gone_wrong_is_told(server):
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    backend = make(model, server)
    model.model.base_model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="response position 2"):
        draw(backend, SEQUENCES[1:2])


# Requests at once, connections, giving up


def test_sequences_are_sent_at_once_and_connections_kept(backend, server):
    for sequence in SEQUENCES:
        server.gate[(*sequence.prompt_ids, *sequence.prefix)] = threading.Event()
    with closing(backend.open(SAMPLING, NEVER)) as stream:
        for sequence in SEQUENCES:
            stream.submit(sequence)
        wait_for(lambda: server.most_at_once == 4)
        opened = server.connections
        for key in (2, 0, 3, 1):
            sequence = SEQUENCES[key]
            server.gate[(*sequence.prompt_ids, *sequence.prefix)].set()
            assert [s for s, _ in stream.collect()] == [sequence], "collect waits for the first, not for all"
        assert stream.collect() == []
    draw(backend)
    assert server.connections == opened <= 5
    wait_for(lambda: not threads())


def test_no_more_requests_are_on_their_way_than_allowed(model, server):
    server.pause = 0.002
    draw(make(model, server, concurrency=2))
    assert server.most_at_once == 2


def test_closing_gives_up_what_is_under_way_and_leaves_no_thread(backend, server):
    server.pause = 10.0
    began = time.monotonic()
    with closing(backend.open(SAMPLING, NEVER)) as stream:
        for sequence in SEQUENCES:
            stream.submit(sequence)
        wait_for(lambda: server.at_once == 4)
        time.sleep(0.05)  # the first token of each is out
    assert time.monotonic() - began < 5
    assert not threads()


def test_the_server_sees_that_an_answer_was_given_up(backend, server):
    server.pause = 0.01
    with closing(backend.open(SAMPLING, NEVER)) as stream:
        stream.submit(Sequence((5,), (), 0, 100))
        wait_for(lambda: server.at_once == 1)
    assert server.broken.wait(5)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.002)
