"""What the tests of rollouts from vLLM share: sequences, and a back end on the server of `fake_vllm`."""

from __future__ import annotations

import pytest
from fake_vllm import Answerer, serving

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.rollout import StopRule, VLLMRollout, rollout
from nabla_fast.rollout.vllm_server import VLLMServer
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import shared_language_model, tiny_tokenizer

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
GREEDY = Sampling(temperature=0.0)
NEVER = StopRule(frozenset())
SEQUENCES = [
    Sequence((5, 6, 7), (), 0, 8),
    Sequence((9,), (30, 31), 1, 8),
    Sequence((10, 11, 12, 13, 14, 15, 16), (), 2, 8),
    Sequence((20, 21), (8,), 3, 8),
]
FAST = {"connect_timeout": 1.0, "timeout": 5.0, "retries": 2, "backoff": 0.001}


@pytest.fixture
def model():
    return LanguageModel(shared_language_model("llama"), tiny_tokenizer())


@pytest.fixture
def server(model):
    with serving(Answerer(model.model, tiny_tokenizer())) as fake:
        yield fake


@pytest.fixture
def backend(model, server):
    return make(model, server)


def make(model, server, **options):
    return VLLMRollout(model, VLLMServer(server.url, **{**FAST, **options}))


def draw(backend, sequences=SEQUENCES, sampling=SAMPLING, stop=NEVER):
    return [r.tokens.tolist() for r in rollout(backend, sequences, sampling, stop)]
