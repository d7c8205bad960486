"""Every family of causal language models in transformers, against an oracle that knows nothing of nabla_fast.

Families of every kind are in the default suite. `make test-families` checks all, each in a process of its own: a family
is right, or it is refused in one sentence, or no tiny model of it can be made.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from families import families, tiny_model, tiny_reward_model
from family_checks import check

TOOL = Path(__file__).resolve().parent.parent / "tools" / "model_families.py"
# How each of these runs; as language models, they have to be right.
MANNERS = {
    "llama": "batches behind prefixes",
    "qwen3": "batches behind prefixes",
    "gemma3_text": "batches behind prefixes",
    "gemma3n_text": "batches behind prefixes",
    "gemma4_text": "batches behind prefixes",
    "gpt2": "batches behind prefixes",
    "gpt_neo": "batches behind prefixes",
    "gpt_oss": "batches behind prefixes",
    "cohere": "batches behind prefixes",
    "granite": "batches behind prefixes",
    "opt": "batches behind prefixes",
    "deepseek_v3": "batches behind prefixes",
    "bart": "one at a time, behind its own cache",
    "deepseek_v32": "one at a time, behind its own cache",
    "falcon_h1": "one at a time, behind its own cache",
    "lfm2": "one at a time, behind its own cache",
    "llama4_text": "one at a time, behind its own cache",
    "qwen3_next": "one at a time, behind its own cache",
    "rwkv": "one at a time, behind its own cache",
    "mamba": "one at a time, gradients over whole sequences",
    "granitemoehybrid": "whole sequences",
    "jamba": "whole sequences",
}
NO_MODELS = {
    "dbrx",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "moshi",
    "musicgen",
    "musicgen_melody",
}
"""Families of which no tiny model is made: they need more than tokens, a package, or their defaults are of no use."""


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("model_families", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("family", "manner"), MANNERS.items())
def test_a_family_is_right(family: str, manner: str) -> None:
    outcome = check(tiny_model(family), tiny_reward_model(family))
    assert outcome["loads"] == manner
    assert [outcome[part] for part in ("gradients", "greedy", "decode")] == ["right"] * 3
    assert outcome["reward"].startswith(("right", "refused", "none"))


def test_a_family_that_cannot_be_right_is_refused() -> None:
    """BERT reads a token's successors too unless it is told otherwise, and its head is more than a product."""
    outcome = check(tiny_model("bert"), None)
    assert all(outcome[part].startswith("refused: model (BertLMHeadModel) ") for part in ("loads", "greedy", "decode"))


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_is_right_or_refused(family: str) -> None:
    outcome = tool().outcome_of(family)
    print(family, *outcome.values(), sep=" | ")
    if family in NO_MODELS:
        pytest.skip(outcome["loads"])
    assert all(found.startswith(("right", "refused", "none")) for part, found in outcome.items() if part != "loads")
    assert not outcome["loads"].startswith(("wrong", "crashed", "not checked"))
