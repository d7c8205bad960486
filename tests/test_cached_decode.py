"""No gradient is computed twice, and nothing but time and counters depends on what was kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nabla_fast as nf
from nabla_fast.decoder import Decoder, Sequence
from nabla_fast.generate import NablaOutput
from nabla_fast.models.backbone import Backbone
from nabla_fast.objective import Objective, Request
from nabla_fast.testing.models import FAMILIES, shared_language_model, shared_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["what is 3 times 4", "the user", "is it on", "12 + 24 =", "the user"]
BASE = nf.NablaConfig(
    max_new_tokens=8,
    max_rollouts=4,
    max_iters=4,
    learning_rate=0.2,
    nll_coeff=0.1,
    gradient_threshold=0.2,
    confidence_threshold=0.99,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
    resample=nf.Sampling(temperature=1.0, top_p=0.95),
)


@functools.cache
def pair(family: str) -> tuple[Any, ...]:
    tokenizer = tiny_tokenizer()
    reward_family = FAMILIES[(FAMILIES.index(family) + 2) % len(FAMILIES)]
    return shared_language_model(family), tokenizer, shared_reward_model(reward_family), tokenizer


def generate(config: nf.NablaConfig, family: str = "llama", prompts: list[str] | None = None) -> NablaOutput:
    return nf.generate(*pair(family), PROMPTS if prompts is None else prompts, config)


def same(one: NablaOutput, other: NablaOutput) -> None:
    assert [s.tolist() for s in one.sequences] == [s.tolist() for s in other.sequences]
    assert one.rewards == pytest.approx(other.rewards, abs=1e-9)
    for mine, theirs in zip(one.stats.sequences, other.stats.sequences, strict=True):
        assert [r.new_token for r in mine.revisions] == [r.new_token for r in theirs.revisions]
        assert mine.optimised_positions == theirs.optimised_positions


configs = st.builds(
    BASE.replace,
    parameterization=st.sampled_from(["latents", "logits"]),
    anchor=st.sampled_from(["argmax", "rollout"]),
    update_postfix=st.booleans(),
    rejection_sampling=st.booleans(),
    checkpoint_activations=st.booleans(),
    gradient_threshold=st.sampled_from([None, 0.0, 0.5]),
    seed=st.integers(0, 99),
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FAMILIES), configs, st.sampled_from([1, 5]))
def test_tokens_and_rewards_do_not_depend_on_what_was_kept(family: str, config: nf.NablaConfig, batch: int) -> None:
    """Cache and prefix, prefix alone, neither: whole sequences evaluated anew every time."""
    prompts = PROMPTS[:batch]
    cached = generate(config, family, prompts)
    same(cached, generate(config.replace(gradient_cache=False), family, prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Backbone, "supports_prefix_cache", property(lambda self: False, lambda self, value: None), raising=False
        )
        same(cached, generate(config.replace(gradient_cache=False, checkpoint_activations=False), family, prompts))


def computed(config: nf.NablaConfig, prompts: list[str]) -> tuple[list[tuple[int, ...]], NablaOutput]:
    """The sequences whose gradients the models were asked for, in order."""
    asked: list[tuple[int, ...]] = []
    compute = Objective._compute

    def spy(self: Objective, requests: list[Request]) -> Any:
        asked.extend(tuple(r.sequence.cache_key(r.response).tolist()) for r in requests)
        return compute(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "_compute", spy)
        return asked, generate(config, prompts=prompts)


@pytest.mark.parametrize("anchor", ["argmax", "rollout"])
@pytest.mark.parametrize("postfix", [False, True])
def test_each_distinct_token_sequence_is_evaluated_once(anchor: str, postfix: bool) -> None:
    rejected = 0
    for seed in range(4):
        config = BASE.replace(anchor=anchor, update_postfix=postfix, seed=seed)
        asked, output = computed(config, PROMPTS)
        assert len(asked) == len(set(asked)) == output.stats.totals.gradient_evaluations
        assert output.stats.totals.cache_misses >= len(asked)
        rejected += sum(
            len(s.revisions) > 0 and not any(r.accepted for r in s.revisions) for s in output.stats.sequences
        )
    assert rejected > 0, "every sequence accepted a proposal or had none"


def test_counters_of_a_greedy_decode_are_those_counted_by_hand() -> None:
    """Nothing moves: every look-up is for the one trajectory, twice a position, and only the first one misses."""
    greedy = nf.Sampling(temperature=0.0)
    config = BASE.replace(
        rollout=greedy,
        resample=greedy,
        learning_rate=0.0,
        gradient_threshold=0.0,
        confidence_threshold=None,
        max_rollouts=9,
    )
    asked, output = computed(config, PROMPTS[:1])
    positions = len(output.sequences[0])
    (stats,) = output.stats.sequences
    assert len(asked) == stats.gradient_evaluations == stats.cache_misses == 1
    assert stats.cache_hits == 2 * positions - 1
    assert stats.optimised_positions == positions > 1
    assert (stats.rollouts, stats.reward_calls, stats.revisions) == (1, 1, [])
    assert stats.model_calls == positions + 4 + 1
    cache = output.stats.cache
    assert (cache["hits"], cache["misses"]) == (2 * positions - 1, 1)
    assert (cache["entries"], cache["evictions"]) == (1, 0)
    assert cache["bytes"] > 0
    uncached = generate(config.replace(gradient_cache=False), prompts=PROMPTS[:1])
    assert uncached.stats.totals.gradient_evaluations == 2 * positions
    assert uncached.stats.cache == {}


@pytest.mark.parametrize("seed", range(5))
def test_counters_of_a_decode_with_many_proposals_are_those_counted_by_hand(seed: int) -> None:
    """Rollouts are greedy and DTO moves nothing, so a gradient is due once per trajectory that has a position left."""
    config = BASE.replace(
        rollout=nf.Sampling(temperature=0.0),
        resample=nf.Sampling(temperature=50.0),
        learning_rate=0.0,
        gradient_threshold=None,
        confidence_threshold=None,
        max_rollouts=99,
        seed=seed,
    )
    asked, output = computed(config, PROMPTS[:1])
    (stats,) = output.stats.sequences
    assert stats.optimised_positions == len(output.sequences[0])
    due = 1 + sum(r.accepted and r.position < stats.optimised_positions - 1 for r in stats.revisions)
    assert len(asked) == stats.gradient_evaluations == stats.cache_misses == due
    assert stats.cache_hits == stats.optimised_positions - due
    assert stats.rollouts == stats.reward_calls == 1 + len(stats.revisions) > 1
    assert stats.rejections == sum(not r.accepted for r in stats.revisions)


@pytest.mark.parametrize("budget", [0, 2000, 20000])
def test_a_tiny_budget_changes_counters_and_never_tokens(budget: int) -> None:
    roomy, tight = generate(BASE), generate(BASE.replace(gradient_cache_bytes=budget))
    same(roomy, tight)
    assert tight.stats.totals.gradient_evaluations >= roomy.stats.totals.gradient_evaluations
    assert tight.stats.cache["bytes"] <= budget
    assert roomy.stats.cache["evictions"] == 0
    if budget == 0:
        assert tight.stats.totals.cache_hits == tight.stats.cache["entries"] == 0
    else:
        assert tight.stats.cache["evictions"] > 0


def test_finished_sequences_keep_no_keys_and_values() -> None:
    held: list[int] = []
    commit = Decoder._commit

    def spy(self: Decoder, sequence: Sequence, position: int) -> None:
        commit(self, sequence, position)
        held.append(sequence.language_cache is not None)
        assert not (sequence.finished and (sequence.language_cache or sequence.reward_cache))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_commit", spy)
        generate(BASE)
    assert any(held)


def test_equal_requests_of_one_call_are_evaluated_once() -> None:
    from test_kv_cache import objective, response, sequence

    ours = objective("llama", gradient_cache=True)
    three = [sequence(ours, [5, 9, 11]) for _ in range(3)]
    y = response(6, seed=0)
    first, later, other = ours.evaluate(
        [Request(three[0], y, 1), Request(three[1], y.clone(), 2), Request(three[2], y[:-1], 1)]
    )
    assert [t.stats.gradient_evaluations for t in three] == [1, 0, 1]
    assert [t.stats.cache_misses for t in three] == [1, 1, 1]
    for mine, theirs in zip(first.rows_from(2), later.rows_from(2), strict=True):
        assert torch.equal(mine, theirs)
    assert len(other.log_likelihoods) == 4


def test_a_selection_evaluates_anew_behind_a_token_that_was_not_the_argmax() -> None:
    from test_kv_cache import objective, response, sequence

    from nabla_fast.selection import select
    from nabla_fast.sequence import Trajectory

    ours = objective("llama", gradient_threshold=1e9, gradient_cache=False)
    tokens = response(5, seed=0)
    hard = tokens.clone()
    hard[2] += 1
    one = sequence(ours, [5, 9, 11])
    one.trajectory = Trajectory(tokens, torch.empty(5, 0), hard, torch.ones(5, dtype=torch.bool), 0.0)
    assert select([one], ours, ours.config) == [5]
    # One for positions 0 to 2, another one from position 3 on, behind the token that was drawn.
    assert one.stats.gradient_evaluations == 2
