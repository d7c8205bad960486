"""Rollouts from a real vLLM that serves SmolLM2 in float32. ``make test-vllm`` starts it and runs these."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

import nabla_fast as nf
from nabla_fast.demo import example
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.loading import load_language_model
from nabla_fast.models.sequence_cache import catch_up
from nabla_fast.rollout import HFRollout, RolloutError, StopRule, VLLMRollout, rollout
from nabla_fast.rollout.vllm_server import VLLMServer
from nabla_fast.sequence import Sequence

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "NABLA_FAST_VLLM_URL" not in os.environ, reason="needs a running vLLM server; make test-vllm starts one"
    ),
]

GREEDY = nf.Sampling(temperature=0.0)
SAMPLING = nf.Sampling(temperature=0.9, top_p=0.95, top_k=200)
NEVER = StopRule(frozenset())
QUESTIONS = (example.QUESTION, "How many letters r are in the word strawberry?", "Name a colour.")
# Two programs add the same float32 numbers in another order. Log-probabilities that differ by less may change places.
TIE = 1e-3


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_language_model(os.environ["NABLA_FAST_VLLM_MODEL"], dtype="float32")
    return LanguageModel(model, tokenizer), tokenizer


@pytest.fixture(scope="module")
def backend(loaded):
    return VLLMRollout(loaded[0], os.environ["NABLA_FAST_VLLM_URL"])


@pytest.fixture(scope="module")
def prompts(loaded):
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tuple(loaded[1].apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in messages]


def sequences(prompts, limit, response=()):
    return [Sequence(prompt, response, seed, limit) for seed, prompt in enumerate(prompts)]


def require_latents(model, sequence, result):
    ids = [*sequence.prompt_ids, *sequence.prefix, *result.tokens.tolist()]
    hidden = model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    first = len(sequence.prompt_ids) + len(sequence.prefix)
    assert len(result.latents) == len(result.tokens)
    torch.testing.assert_close(result.latents, hidden[first - 1 : -1], rtol=1e-4, atol=1e-4)


def require_own_choice(model, result):
    """Every token is the model's likeliest after those before it, or nearly."""
    rows = model.logits(result.latents).log_softmax(-1)
    drawn = rows.gather(-1, result.tokens[:, None])[:, 0]
    assert float((rows.amax(-1) - drawn).max()) < TIE


@torch.no_grad()
def test_latents_are_the_full_forwards_alone_in_a_batch_and_behind_a_cache(loaded, backend, prompts):
    model, _ = loaded
    drawn = rollout(backend, sequences(prompts, 24), SAMPLING, NEVER)
    for sequence, result in zip(sequences(prompts, 24), drawn, strict=True):
        assert len(result.tokens) == 24
        require_latents(model, sequence, result)
        cache = model.new_cache(sequence.prompt_ids)
        catch_up(model.backbone, model.embedding, [cache], [result.tokens], [16])
        prefix = tuple(result.tokens[:8].tolist())
        other = Sequence(sequence.prompt_ids, prefix, 7, 24, language_cache=cache)
        (again,) = rollout(backend, [other], SAMPLING, NEVER)
        require_latents(model, other, again)


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_model_itself_up_to_the_first_near_tie(loaded, backend, prompts):
    model, _ = loaded
    stop = StopRule(model.eos_token_ids)
    drawn, own = (rollout(b, sequences(prompts, 24), GREEDY, stop) for b in (backend, HFRollout(model)))
    compared = 0
    for result, theirs in zip(drawn, own, strict=True):
        require_own_choice(model, result)
        top = model.logits(result.latents).log_softmax(-1).topk(2, -1).values
        tied = (top[:, 0] - top[:, 1] < TIE).nonzero()[:, 0].tolist()
        sure = tied[0] if tied else len(result.tokens)
        compared += sure
        assert result.tokens[:sure].tolist() == theirs.tokens[:sure].tolist()
        if not tied:
            assert len(result.tokens) == len(theirs.tokens)
    assert compared > 20, "too soon a tie for this to say much"


def test_seeds_are_repeatable_and_differ(backend, prompts):
    first, second = (rollout(backend, sequences(prompts[:1] * 4, 16), SAMPLING, NEVER) for _ in range(2))
    assert [r.tokens.tolist() for r in first] == [r.tokens.tolist() for r in second]
    assert len({tuple(r.tokens.tolist()) for r in first}) > 1


def test_an_end_token_ends_the_response_where_the_rule_says_so_and_only_there(loaded, backend, prompts):
    model, _ = loaded
    (end,) = model.eos_token_ids
    # A prompt that asks for nothing more, with an end token in it: the likeliest answer is to end.
    (result,) = rollout(backend, sequences(prompts[2:], 200), GREEDY, StopRule(model.eos_token_ids))
    assert result.tokens[-1] == end
    assert end not in result.tokens[:-1].tolist()
    (onward,) = rollout(backend, sequences(prompts[2:], len(result.tokens) + 5), GREEDY, NEVER)
    assert onward.tokens[: len(result.tokens)].tolist() == result.tokens.tolist()
    assert len(onward.tokens) == len(result.tokens) + 5
    said = tuple(result.tokens[:-1].tolist())
    (immediate,) = rollout(backend, sequences(prompts[2:], 200, said), GREEDY, StopRule(model.eos_token_ids))
    assert immediate.tokens.tolist() == [end]


def test_a_stop_string_split_over_tokens_ends_the_response(loaded, backend, prompts):
    tokenizer = loaded[1]
    (whole,) = rollout(backend, sequences(prompts[1:2], 24), GREEDY, NEVER)
    text = tokenizer.decode(whole.tokens[:12])
    string = text[-7:-1]  # it begins and ends within tokens
    stop = StopRule(frozenset(), (string,), tokenizer)
    (result,) = rollout(backend, sequences(prompts[1:2], 24), GREEDY, stop)
    assert string in tokenizer.decode(result.tokens)
    assert string not in tokenizer.decode(result.tokens[:-1])
    assert result.tokens.tolist() == whole.tokens[: len(result.tokens)].tolist()


def test_the_context_may_be_filled_and_not_exceeded(backend):
    length = backend.engine.context_length
    full = Sequence(tuple(200 + i % 1000 for i in range(length - 4)), (), 0, 4)
    (result,) = rollout(backend, [full], SAMPLING, NEVER)
    assert len(result.tokens) == 4
    with pytest.raises(RolloutError, match=f"takes {length} tokens"):
        rollout(backend, [Sequence(full.prompt_ids, (), 0, 5)], SAMPLING, NEVER)


def test_another_model_is_refused(backend):
    model, tokenizer = load_language_model(os.environ["NABLA_FAST_VLLM_MODEL"], dtype="float32")
    weight = model.get_input_embeddings().weight
    weight.copy_(weight.roll(1, 0))  # every id means the token before
    with pytest.raises(RolloutError, match="serves 'smollm2', which is not"):
        VLLMRollout(LanguageModel(model, tokenizer), backend.engine)


def test_a_smaller_vocabulary_is_refused(loaded, backend):
    with pytest.raises(RolloutError, match="HTTP 400"):
        backend.engine.log_probabilities([1, 2, loaded[0].vocab_size])


def test_sequences_run_at_once_and_end_when_the_stream_is_closed(backend, prompts):
    with closing(backend.open(SAMPLING, NEVER)) as stream:
        for sequence in sequences((prompts * 3)[:8], 400):
            stream.submit(sequence)
        wait_for_running(8)
    # The server counts anew when it has something to do.
    rollout(backend, sequences(prompts[:1], 2), SAMPLING, NEVER)
    wait_for_running(0)


def wait_for_running(count):
    deadline = time.monotonic() + 120
    while (running := running_requests()) != count:
        assert time.monotonic() < deadline, f"{running} requests are running, not {count}"
        time.sleep(0.2)


def running_requests():
    with urllib.request.urlopen(os.environ["NABLA_FAST_VLLM_URL"] + "/metrics", timeout=30) as answer:
        (count,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(count)


def test_an_engine_in_process_gives_the_same_greedy_tokens(backend, prompts, tmp_path):
    script = Path(__file__).with_name("vllm_in_process.py")
    given, results = tmp_path / "prompts.json", tmp_path / "results.json"
    given.write_text(json.dumps([list(prompt) for prompt in prompts]))
    python, model = os.environ["NABLA_FAST_VLLM_PYTHON"], os.environ["NABLA_FAST_VLLM_MODEL"]
    path = os.pathsep.join([str(script.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = tmp_path / "log"
    with log.open("w") as file:
        # Not into a pipe, which would stay open for as long as any process of vLLM's does.
        process = subprocess.Popen(
            [python, str(script), model, str(given), str(results)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert process.wait(timeout=600) == 0, log.read_text()[-6000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = json.loads(results.read_text())
    assert result["latents"] < 1e-4
    assert result["refused"], "a model that is another one was taken"
    drawn = rollout(backend, sequences(prompts, 16), GREEDY, NEVER)
    for ours, theirs in zip(drawn, result["tokens"], strict=True):
        assert ours.tokens[: len(theirs)].tolist() == theirs


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_server_killed_within_an_answer_is_an_error(backend, loaded, prompts):
    """The last of all, for it leaves no server."""
    engine = VLLMServer(os.environ["NABLA_FAST_VLLM_URL"], retries=2, backoff=0.1)
    dying = VLLMRollout(loaded[0], engine)
    with closing(dying.open(SAMPLING, NEVER)) as stream:
        for sequence in sequences(prompts, 400):
            stream.submit(sequence)
        time.sleep(1.0)
        os.killpg(int(os.environ["NABLA_FAST_VLLM_PID"]), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RolloutError, match=r"cannot be reached \(.*refused.*\), 3 attempts"):
            stream.collect()
    assert time.monotonic() - began < 10
