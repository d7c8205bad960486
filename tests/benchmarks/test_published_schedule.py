"""The baseline of the benchmarks gives what `nabla_fast.generate` gives."""

from __future__ import annotations

from functools import lru_cache

import pytest
from published_schedule import Models, PublishedSchedule, State

import nabla_fast as nf
from nabla_fast.generate import make_pair, stop_rule
from nabla_fast.rollout import HFRollout
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["what is 3 times 4", "12 + 24 ="]
COUNTERS = ("rollouts", "rejections", "generated_tokens", "dto_iterations", "optimised_positions", "skipped_positions")
BASE = nf.NablaConfig(
    max_new_tokens=8,
    max_rollouts=4,
    max_iters=6,
    learning_rate=0.2,
    nll_coeff=0.1,
    gradient_threshold=0.3,
    confidence_threshold=0.99,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
    resample=nf.Sampling(temperature=1.0, top_p=0.95),
)
VARIANTS = [
    {"parameterization": parameterization, "anchor": anchor, "update_postfix": update_postfix}
    for parameterization in ("latents", "logits")
    for anchor in ("argmax", "rollout")
    for update_postfix in (False, True)
]
VARIANTS += [
    {"gumbel_noise": 0.5},
    {"gradient_threshold": None, "weight_decay": 0.1},
    {"entropy_threshold": 1.0, "confidence_threshold": None, "rejection_sampling": False},
    {"lr_schedule": "linear", "warmup_iters": 2, "min_lr_ratio": 0.4},
    {"lr_schedule": "constant", "warmup_iters": 1},
]


@lru_cache
def models():
    tokenizer = tiny_tokenizer()
    return tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer


@lru_cache
def published(prompt: str, config: nf.NablaConfig) -> State:
    pair = make_pair(*models(), config)
    schedule = PublishedSchedule(Models(*models()), HFRollout(pair.language_model), config, stop_rule(pair, config))
    return schedule.decode([{"role": "user", "content": prompt}])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_published_schedule_gives_the_same_answer(variant):
    config = BASE.replace(**variant)
    revised = 0
    for prompt in PROMPTS:
        ours = nf.generate(*models(), prompt, config)
        record, theirs = ours.stats.sequences[0], published(prompt, config)
        assert ours.sequences[0].tolist() == theirs.trajectory.tokens.tolist()
        assert ours.rewards[0] == pytest.approx(theirs.trajectory.reward, abs=1e-9)
        assert {name: getattr(record, name) for name in COUNTERS} == {n: getattr(theirs.stats, n) for n in COUNTERS}
        assert [r.new_token for r in record.revisions] == [r.new_token for r in theirs.stats.revisions]
        assert record.gradient_evaluations <= theirs.stats.gradient_evaluations
        assert record.reward_calls <= theirs.stats.reward_calls
        revised += len(record.revisions)
    assert revised > 0, "no token was ever proposed, so the loop was not tested"


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3], VARIANTS[6]], ids=str)
def test_an_optimization_evaluates_as_often_as_ours_without_a_cache(variant):
    config = BASE.replace(**variant, gradient_threshold=None, gradient_cache=False)
    ours = nf.generate(*models(), PROMPTS[0], config).stats.totals
    assert ours.gradient_evaluations == published(PROMPTS[0], config).stats.gradient_evaluations > 0
