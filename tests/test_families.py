"""Families of models against an oracle that knows nothing of nabla_fast: one of every kind, and all by a make target.

What is checked is in `family_checks`. Nothing may be wrong, and nothing may crash: a family works or is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from families import families, tiny_model, tiny_reward_model
from family_checks import PARTS, check

pytestmark = pytest.mark.usefixtures("one_thread")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

# One for each kind: what it is there for.
WORKING = {
    "bart": "positions that count columns",
    "bloom": "no positions, biases by distance",
    "cohere": "scaled logits",
    "deepseek_v3": "keys and values from latents, experts with groups",
    "falcon_h1": "attention and recurrence in one layer, multipliers",
    "gemma2": "capped logits and windows",
    "gemma3n_text": "embeddings per layer",
    "gemma4_text": "embeddings per layer, and layers of several widths",
    "gpt2": "learnt positions",
    "gpt_neo": "windows under another name",
    "gpt_oss": "sinks, windows, experts",
    "gptj": "a head with a bias",
    "granitemoehybrid": "recurrent layers, experts, scaled logits",
    "jamba": "recurrent layers between attention",
    "lfm2": "convolutions",
    "llama4_text": "chunks; its own base model",
    "mamba": "nothing but recurrence",
    "minimax": "a cache of a class of its own",
    "opt": "positions from the mask",
    "qwen3_next": "a delta rule",
    "rwkv": "a state that is a list",
}


def outcome_of(family: str) -> dict[str, str]:
    return check(tiny_model(family), tiny_reward_model(family))


@pytest.mark.parametrize("family", WORKING)
def test_families_of_every_kind_are_right(family: str) -> None:
    outcome = outcome_of(family)
    assert {part: outcome[part] for part in ("gradients", "greedy", "decode")} == dict.fromkeys(
        ("gradients", "greedy", "decode"), "right"
    )
    assert outcome["reward"].startswith(("right", "none", "refused"))


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_is_right_or_refused(family: str, record_property: Any) -> None:
    """In a process of its own, as some of them are large or crash."""
    from model_families import in_a_process

    outcome = in_a_process(family)
    record_property("outcome", outcome)
    faults = {part: text for part, text in outcome.items() if text.startswith(("wrong", "crashed"))}
    assert not faults
    assert set(outcome) <= set(PARTS)


def test_what_is_wrong_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves: a wrong gradient, other tokens and a crash are told apart from what is right."""
    from nabla_fast.models.language_model import LanguageModel
    from nabla_fast.objective import Objective

    model = tiny_model("llama")
    find = Objective._likelihood_gradient

    def scaled(self: Any, requests: Any) -> Any:
        part = find(self, requests)
        part.factors = [1.01 * factor for factor in part.factors]
        return part

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "_likelihood_gradient", scaled)
        assert check(model, None)["gradients"].startswith("wrong: 0.01 ")
    logits = LanguageModel.logits
    with monkeypatch.context() as patch:
        # As the load check sees it, all is well.
        patch.setattr(LanguageModel, "_check_head", lambda *_: None)
        patch.setattr(LanguageModel, "logits", lambda self, hidden: -logits(self, hidden))
        assert check(tiny_model("llama"), None)["greedy"] == "wrong: other tokens from 0 on"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "track", lambda *_: 1 / 0)
        assert check(model, None)["decode"].startswith("crashed: ZeroDivisionError")
