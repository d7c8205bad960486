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

TOOL = Path(__file__).resolve().parents[2] / "tools" / "model_families.py"
BATCHED = "batches behind prefixes"
FAST = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt2",
    "gpt_neo",
    "gpt_oss",
    "cohere",
    "granite",
    "opt",
    "deepseek_v3",
)
ALONE = (
    "bart",
    "deepseek_v32",
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama4_text",
    "mamba",
    "qwen3_next",
    "rwkv",
)
"""Families that have to be right as language models: in batches behind prefixes, or however it can be done."""
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


@pytest.mark.parametrize("family", [*FAST, *ALONE])
def test_a_family_is_right(family: str) -> None:
    outcome = check(tiny_model(family), tiny_reward_model(family))
    assert [outcome[part] for part in ("gradients", "greedy", "decode")] == ["right"] * 3, outcome
    assert (outcome["loads"] == BATCHED) == (family in FAST)
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
