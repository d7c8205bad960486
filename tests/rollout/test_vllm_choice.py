"""Which vLLM is taken: by the configuration, at a URL, in this process; and whole decodes with it."""

from __future__ import annotations

import gc
import sys
import time
import types
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import vllm_cases
from fake_vllm import Answerer
from processed import Processed
from vllm_cases import FAST, NEVER, SAMPLING, SEQUENCES, draw, make

import nabla_fast as nf
from nabla_fast.baselines import best_of_n, greedy
from nabla_fast.config import NablaConfig
from nabla_fast.generate import make_pair, run, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.rollout import RolloutError, VLLMRollout, vllm, vllm_server
from nabla_fast.rollout.vllm_engine import VLLMEngine
from nabla_fast.rollout.vllm_server import VLLMServer
from nabla_fast.sampling import Sampler
from nabla_fast.testing.models import (
    CONTEXT,
    shared_language_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
model, server, backend = vllm_cases.model, vllm_cases.server, vllm_cases.backend  # fixtures


def test_the_configuration_chooses(model, server, monkeypatch):
    assert vllm.chosen(model, NablaConfig()) is None
    assert vllm.chosen(model, NablaConfig(rollout_backend="hf")) is None
    for name in ("auto", "vllm"):
        at_url = vllm.chosen(model, NablaConfig(rollout_backend=name, vllm_url=server.url))
        assert isinstance(at_url.engine, VLLMServer)
    with pytest.raises(ValueError, match=r"rollout_backend is 'vllm', but .*; give vllm_url"):
        vllm.chosen(model, NablaConfig(rollout_backend="vllm"))
    asked = []
    monkeypatch.setattr(vllm, "_engine", lambda *args: asked.append(args) or at_url.engine)
    monkeypatch.setattr(model.model.config, "name_or_path", "some/folder")
    vllm.chosen(model, NablaConfig(rollout_backend="vllm"))
    vllm.chosen(model, NablaConfig(rollout_backend="vllm", vllm_gpu_memory_utilization=0.25))
    assert asked == [("some/folder", "float64", None), ("some/folder", "float64", 0.25)]


PAIR_CONFIG = NablaConfig(
    max_new_tokens=10, max_rollouts=4, max_iters=4, learning_rate=0.2, gradient_threshold=None, rollout=SAMPLING
)
QUESTIONS = ["what is 3 times 4", "the user", "is it on"]


@pytest.fixture
def models(model):
    tokenizer = tiny_tokenizer()
    return model.model, tokenizer, tiny_reward_model("qwen3"), tokenizer


def test_generate_and_the_baselines_draw_from_the_server(server, models):
    config = PAIR_CONFIG.replace(vllm_url=server.url)
    before = len(server.requests)
    out = nf.generate(*models, QUESTIONS, config)
    assert len(server.requests) - before >= out.stats.totals.rollouts > len(QUESTIONS)
    assert out.stats.totals.revisions
    again = nf.generate(*models, QUESTIONS, config.replace(max_batch_size=1))
    assert [s.tolist() for s in again.sequences] == [s.tolist() for s in out.sequences]
    before = len(server.requests)
    best_of_n(*models, QUESTIONS[:1], n=3, config=config)
    assert len(server.requests) - before >= 3


def test_a_decode_that_loses_its_server_has_what_was_committed(server, models, model):
    # Rollouts enough that nobody can be done when the first token is committed.
    config = PAIR_CONFIG.replace(vllm_url=server.url, max_rollouts=12)
    whole = nf.generate(*models, QUESTIONS, config)
    pair = replace(make_pair(*models, PAIR_CONFIG), vllm=make(model, server))
    heard, dead = {}, []

    class Killer:
        def on_phase(self, phase, sequences):
            pass

        def on_commit(self, index, tokens, length):
            heard.setdefault(index, []).extend(tokens)
            if not dead:
                dead.append(index)
                server.die()

    prompts = [tuple(generation_prompt_ids(pair.tokenizer, [{"role": "user", "content": q}])) for q in QUESTIONS]
    frames = [pair.reward_model.chat_frame([{"role": "user", "content": q}]) for q in QUESTIONS]
    with pytest.raises(RolloutError, match="vllm_url") as error:
        run(pair, prompts, frames, config, stop_rule(pair, config), observer=Killer())
    committed, responses = error.value.committed, error.value.responses
    assert [list(tokens) for tokens in committed] == [heard.get(i, []) for i in range(3)]
    assert max(map(len, committed)) >= 1
    for tokens, response, meant in zip(committed, responses, whole.sequences, strict=True):
        assert response[: len(tokens)] == tokens
        assert meant.tolist()[: len(tokens)] == list(tokens)


@pytest.mark.parametrize("cap", [10**6, 3])
def test_a_repetition_penalty_of_the_model_means_on_the_server_what_it_means_here(server, models, cap):
    plain = greedy(*models, QUESTIONS, PAIR_CONFIG)
    server.answerer.cap = cap  # what is continued counts what is there already
    models[0].generation_config.repetition_penalty = 1.7
    try:
        own = greedy(*models, QUESTIONS, PAIR_CONFIG)
        drawn = greedy(*models, QUESTIONS, PAIR_CONFIG.replace(vllm_url=server.url))
        out = nf.generate(*models, QUESTIONS[:1], PAIR_CONFIG.replace(vllm_url=server.url))
    finally:
        models[0].generation_config.repetition_penalty = None
    assert [s.tolist() for s in drawn.sequences] == [s.tolist() for s in own.sequences]
    assert [s.tolist() for s in drawn.sequences] != [s.tolist() for s in plain.sequences]
    assert out.stats.totals.rollouts
    assert {asked["repetition_penalty"] for asked in server.requests} == {1.7}


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.7, "min_new_tokens": 2}, {"no_repeat_ngram_size": 2}])
def test_what_the_server_does_not_know_is_refused_by_name(server, models, setting):
    for name, value in setting.items():
        setattr(models[0].generation_config, name, value)
    try:
        with pytest.raises(ValueError, match=r"knows repetition_penalty alone, and .* asks for .*LogitsProcessor;"):
            nf.generate(*models, QUESTIONS, PAIR_CONFIG.replace(vllm_url=server.url))
    finally:
        for name in setting:
            setattr(models[0].generation_config, name, None)


def test_logits_processors_and_vllm_do_not_go_together(server, models):
    pair = make_pair(*models, PAIR_CONFIG.replace(vllm_url=server.url))
    assert pair.rollouts(PAIR_CONFIG, Sampler()) is pair.vllm
    with pytest.raises(ValueError, match="logits_processor cannot be used"):
        pair.rollouts(PAIR_CONFIG, Processed(before=(lambda ids, scores: scores,)))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "nonsense", "http://[::"])
def test_what_is_no_url_is_named(model, url):
    with pytest.raises(ValueError, match=r"vllm_url .* is not a URL; it must be like http://") as caught:
        VLLMRollout(model, url)
    assert repr(url) in str(caught.value)


def test_nobody_there(model, server):
    with pytest.raises(RolloutError, match=r"vllm_url 'http://127\.0\.0\.1:1' cannot be reached \(.*refused"):
        VLLMRollout(model, VLLMServer("http://127.0.0.1:1", **FAST))


def test_an_address_without_vllm(server):
    with pytest.raises(RolloutError, match="answers HTTP 404"):
        VLLMServer(f"{server.url}/elsewhere", **FAST)
    server.served = ()
    with pytest.raises(RolloutError, match="lists no model"):
        VLLMServer(server.url, **FAST)


def test_the_url_may_have_v1_behind_it_and_the_model_a_name(server, model):
    server.served = ("other", "tiny")
    assert VLLMServer(f"{server.url}/v1/", **FAST).model == "other"
    assert VLLMServer(server.url, model="tiny", **FAST).model == "tiny"
    with pytest.raises(RolloutError, match="does not serve model 'big'; it serves 'other', 'tiny'"):
        VLLMServer(server.url, model="big", **FAST)
    assert VLLMRollout(model, server.url).engine.context_length == CONTEXT


@pytest.mark.parametrize("listing", ["silent", "endless", "chunk", "head"])
def test_a_server_that_only_listens_or_never_stops_is_given_up(server, monkeypatch, listing):
    server.listing = listing
    monkeypatch.setattr(vllm_server, "_MAX_BODY", 2**20)
    began = time.monotonic()
    message = "answers with more than 1048576" if listing == "endless" else r"gave no .* 0\.2 s, 1 attempt"
    with pytest.raises(RolloutError, match=message):
        VLLMServer(server.url, **{**FAST, "timeout": 5.0 if listing == "endless" else 0.2})
    assert time.monotonic() - began < 3


SECRET = "sk-do-not-print-me"


def test_the_key_is_sent_and_in_no_message(server, model, monkeypatch):
    server.api_key = SECRET
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    wanted = (
        r"answers HTTP 401 to /v1/models; give the server's key as vllm_api_key, or in the .* variable VLLM_API_KEY"
    )
    with pytest.raises(RolloutError, match=wanted):
        VLLMServer(server.url, **FAST)
    config = NablaConfig(vllm_url=server.url, vllm_api_key=SECRET, vllm_model="tiny", vllm_timeout=7.0)
    assert draw(vllm.chosen(model, config)) == draw(make(model, server, api_key=SECRET))
    assert SECRET not in repr(config)
    assert SECRET not in str(config.to_dict())
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    assert VLLMServer(server.url, **FAST).model == "tiny"
    with pytest.raises(RolloutError, match=r"401.* give another key") as caught:
        VLLMServer(server.url, api_key=f"{SECRET}-wrong", **FAST)
    assert SECRET not in str(caught.value)


def test_a_server_that_repeats_the_key_is_not_repeated(server):
    engine = VLLMServer(server.url, api_key=SECRET, **FAST)
    assert SECRET not in str(engine._refusal(500, "/v1/models", f'{{"error": "bad key {SECRET}"}}'.encode()))


@pytest.mark.parametrize("key", ["", "two words", "line\n", "\u00e9", 7])
def test_what_cannot_be_a_key_is_refused_unprinted(server, monkeypatch, key):
    for make_ in (
        lambda: NablaConfig(vllm_url=server.url, vllm_api_key=key),
        lambda: VLLMServer(server.url, api_key=key),
    ):
        with pytest.raises((ValueError, TypeError), match=r"vllm_api_key (cannot be a key|must be a string)") as caught:
            make_()
        assert not key or repr(key) not in str(caught.value)
    if key == "two words":
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ValueError, match="the environment variable VLLM_API_KEY cannot be a key"):
            VLLMServer(server.url)


@pytest.mark.parametrize(
    "url", ["http://user:secret@127.0.0.1:8000", "http://127.0.0.1:8000/?key=secret", "secret@[::", "http://h/#secret"]
)
def test_a_password_in_the_url_is_refused_unprinted(url):
    for make_ in (lambda: NablaConfig(vllm_url=url), lambda: VLLMServer(url)):
        with pytest.raises(ValueError, match="vllm_url has more than an address, such as a password") as caught:
            make_()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_model": "m"}, "vllm_model is given, but vllm_url is not"),
        ({"vllm_api_key": "k"}, "vllm_api_key is given, but vllm_url is not"),
        ({"vllm_timeout": 0}, "vllm_timeout must be above 0 and at most 86400, got 0"),
        ({"vllm_timeout": float("inf")}, "vllm_timeout must be above 0"),
        ({"vllm_url": "http://a", "vllm_model": ""}, "vllm_model must be a name or None"),
        ({"vllm_url": "http://a b"}, "is not a URL"),
        *(
            (
                {"rollout_backend": "vllm", "vllm_gpu_memory_utilization": share},
                f"vllm_gpu_memory_utilization must be .*, got {share!r}",
            )
            for share in (0, -0.1, 1.1, float("nan"), True, "0.4")
        ),
        ({"vllm_gpu_memory_utilization": 0.5}, "is 0.5, but rollout_backend is 'auto'; .* rollout_backend 'vllm'"),
        (
            {"vllm_url": "http://a", "vllm_gpu_memory_utilization": 0.5},
            "is 0.5, but vllm_url is given; .*: vllm serve --gpu-memory-utilization 0.5",
        ),
        ({"vllm_url": "http://a:99999"}, "is not a URL"),
    ],
)
def test_settings_of_a_server_that_cannot_be_are_named(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NablaConfig(**settings)


@pytest.mark.parametrize(
    "other",
    [
        lambda: LanguageModel(tiny_language_model("llama", seed=1), tiny_tokenizer()),
        lambda: LanguageModel(tiny_language_model("qwen3"), tiny_tokenizer()),
        lambda: LanguageModel(permuted(tiny_language_model("llama")), tiny_tokenizer()),
    ],
    ids=["weights", "family", "order of tokens"],
)
def test_another_model_is_refused(server, other):
    with pytest.raises(RolloutError, match=r"serves 'tiny', which is not model .*: log-prob.* differ by .* nats"):
        make(other(), server)


def permuted(model):
    """The same model under another tokenizer, which numbers two tokens the other way round."""
    weight = model.get_input_embeddings().weight
    order = torch.arange(len(weight))
    order[[40, 41, 50, 51, 60, 61, 70, 71]] = order[[41, 40, 51, 50, 61, 60, 71, 70]]
    weight.copy_(weight[order].clone())
    return model


def test_a_smaller_vocabulary_is_refused(server):
    model = LanguageModel(tiny_language_model("llama", vocab_rows=200), bigger_tokenizer())
    with pytest.raises(RolloutError, match=r"not model .*out of vocabulary.*token ids up to \d+"):
        make(model, server)


def bigger_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra", "yacht"])
    return tokenizer


# vLLM in this process


class FakeLLM:
    """``vllm.LLM`` as far as it is used: one token for every request at a step."""

    def __init__(self, model, **options):
        self.options = options
        self.answerer = Answerer(shared_language_model("llama"), tiny_tokenizer())
        self.model_config = types.SimpleNamespace(max_model_len=CONTEXT)
        self.llm_engine = self.engine_core = self
        self.ended = 0
        self.running, self.aborted, self.dead = {}, [], False

    def generate(self, prompts, params, use_tqdm):
        rows = self.answerer.log_probabilities(prompts[0]["prompt_token_ids"])
        as_objects = [row and {int(t): types.SimpleNamespace(**entry) for t, entry in row.items()} for row in rows]
        return [types.SimpleNamespace(prompt_logprobs=as_objects)]

    def add_request(self, name, prompt, params):
        self.running[name] = self.answerer.tokens(prompt["prompt_token_ids"], vars(params)), []

    def step(self):
        if self.dead:
            raise RuntimeError("EngineCore encountered an issue")
        outputs = []
        for name, (source, tokens) in list(self.running.items()):
            token, finish = next(source)
            tokens.append(token)
            if finish:
                del self.running[name]
            answer = types.SimpleNamespace(token_ids=list(tokens), finish_reason=finish)
            outputs.append(types.SimpleNamespace(request_id=name, finished=bool(finish), outputs=[answer]))
        return outputs

    def shutdown(self):
        self.ended += 1

    def abort_request(self, names):
        self.aborted += [name for name in names if self.running.pop(name, None)]


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def engine(fake_vllm):
    return VLLMEngine("folder", max_model_len=CONTEXT)


def test_an_engine_gives_what_a_server_gives(engine, backend, model):
    assert engine._llm.options == {"gpu_memory_utilization": 0.4, "max_model_len": CONTEXT}
    assert draw(VLLMRollout(model, engine)) == draw(backend)


def test_streams_of_one_engine_keep_their_answers_apart(engine, model):
    backend = VLLMRollout(model, engine)
    with closing(backend.open(SAMPLING, NEVER)) as first, closing(backend.open(SAMPLING, NEVER)) as second:
        first.submit(SEQUENCES[0])
        second.submit(SEQUENCES[2])
        drawn = [stream.collect()[0][1].tokens.tolist() for stream in (second, first)]
        first.submit(SEQUENCES[1])
    assert drawn == draw(backend, [SEQUENCES[2], SEQUENCES[0]])
    assert len(engine._llm.aborted) == 1
    assert not engine._llm.running


def test_an_engine_that_dies_is_an_error(engine, model):
    backend = VLLMRollout(model, engine)
    engine._llm.dead = True
    with pytest.raises(RolloutError, match=r"the vLLM of this process \(folder\) failed in step: EngineCore"):
        draw(backend)


def test_an_engine_nobody_holds_ends_its_processes(fake_vllm):
    engine = VLLMEngine("folder")
    llm = engine._llm
    gc.collect()
    assert llm.ended == 0
    del engine
    gc.collect()
    assert llm.ended == 1


def test_closing_an_engine_ends_its_processes_once(engine):
    for _ in range(2):
        engine.close()
        assert engine._llm.ended == 1


def test_an_engine_is_started_once_and_keeps_its_share_of_the_gpu(model, fake_vllm, monkeypatch):
    monkeypatch.setattr(vllm, "_ENGINES", {})
    monkeypatch.setattr(model.model.config, "name_or_path", "folder")
    config = NablaConfig(rollout_backend="vllm", vllm_gpu_memory_utilization=1)
    engine = vllm.chosen(model, config).engine
    assert engine._llm.options == {"gpu_memory_utilization": 1, "dtype": "float64"}
    for same in (config, config.replace(vllm_gpu_memory_utilization=None)):
        assert vllm.chosen(model, same).engine is engine
    with pytest.raises(ValueError, match=r"utilization is 0\.3, but .* \(folder\) was started with 1 and keeps it"):
        vllm.chosen(model, config.replace(vllm_gpu_memory_utilization=0.3))
    monkeypatch.setattr(vllm, "_ENGINES", {})
    other = vllm.chosen(model, config.replace(vllm_gpu_memory_utilization=None)).engine
    assert other._llm.options["gpu_memory_utilization"] == 0.4


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused_before_vllm_starts(share, fake_vllm):
    with pytest.raises(ValueError, match=f"gpu_memory_utilization must be above 0 and at most 1, got {share}"):
        VLLMEngine("folder", gpu_memory_utilization=share)


def test_without_vllm_the_engine_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm, or give the vllm_url of a running server"):
        VLLMEngine("folder")
