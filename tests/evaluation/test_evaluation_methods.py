"""Methods on tiny models: what they answer, and that they are counted as the paper counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.evaluation import flops, methods
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.models.chat import as_chats
from nabla_fast.stats import Revision, SequenceStats
from nabla_fast.testing.models import (
    WIDTH,
    shared_language_model,
    shared_reward_model,
    tiny_language_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["what is 3 times 4", "is it on", "the user"]
CONFIG = nf.NablaConfig(
    max_new_tokens=6,
    max_iters=3,
    learning_rate=0.3,
    gradient_threshold=None,
    rollout=nf.Sampling(temperature=1.0),
    resample=nf.Sampling(temperature=1.0),
)
TOKENIZER = tiny_tokenizer()


class Grader:
    """The first character is the answer."""

    def answer(self, problem_id, response):
        return response[:1] or None

    def same(self, one, other):
        return one == other


@pytest.fixture(scope="module")
def models():
    return shared_language_model("llama"), TOKENIZER, shared_reward_model("qwen3"), TOKENIZER


@pytest.fixture(scope="module")
def loaded(models):
    return methods.load(*models)


def batch(loaded, prompts, n, *, size=8, config=CONFIG):
    problems = [Problem(text, tuple(as_chats(text)[0]), "1") for text in prompts]
    ids = [loaded.prompt_ids(problem) for problem in problems]
    return methods.make_batch(loaded, problems, nf.sampling.sequence_seeds(config.seed, ids), Grader(), config, n, size)


def outline(answers):
    return [(a.text, a.tokens, a.reward, a.stats.counters()) for a in answers]


def test_best_of_n_scores_every_sample_and_takes_the_best(models):
    out = baselines.best_of_n(*models, PROMPTS, 4, CONFIG)
    rewards = {}
    for n in (1, 2, 3, 4):
        for i, reward in enumerate(baselines.best_of_n(*models, PROMPTS, n, CONFIG).rewards):
            assert reward > rewards.get(i, reward) - 1e-9, "more samples hold the ones of fewer"
            rewards[i] = reward
    assert out.rewards == pytest.approx(list(rewards.values()))
    for stats in out.stats.sequences:
        assert (stats.rollouts, stats.reward_calls, stats.gradient_evaluations) == (4, 4, 0)
        assert stats.model_calls == stats.generated_tokens + 4


def test_the_first_sample_is_the_rollout_that_nabla_starts_from(models):
    plain = nf.generate(*models, PROMPTS, CONFIG.replace(max_rollouts=1))
    first = baselines.best_of_n(*models, PROMPTS, 1, CONFIG)
    assert first.texts == plain.texts
    assert first.rewards == pytest.approx(plain.rewards)
    assert first.stats.totals.counters() == {**plain.stats.totals.counters(), "skipped_positions": 0}


def test_rewards_are_those_of_the_reward_model(models):
    pair = _pair(models)
    for i, group in enumerate(baselines.sample(pair, *_tokens(pair, PROMPTS), 3, CONFIG, scored=True)):
        frame = pair.reward_model.chat_frame(as_chats(PROMPTS[i])[0])
        conversations = [pair.reward_model.conversation(frame, tokens) for tokens in group.sequences]
        expected, _ = pair.reward_model.rewards(conversations)
        assert group.rewards == pytest.approx(expected.tolist())
        assert baselines.best(group) == int(expected.argmax())


def test_self_consistency_takes_the_majority_and_scores_nothing(models):
    out = baselines.self_consistency(*models, PROMPTS[0], 8, lambda text: text[:1] or None, str.__eq__, CONFIG)
    (group,) = baselines.sample(
        *(pair := _pair(models),), *_tokens(pair, PROMPTS[:1]), 8, CONFIG, scored=False, batch_size=3
    )
    first = [TOKENIZER.decode(tokens, skip_special_tokens=True)[:1] for tokens in group.sequences]
    assert out.texts[0][:1] == max(first, key=first.count)
    assert out.stats.totals.reward_calls == 0
    assert out.rewards[0] != out.rewards[0]
    assert group.rewards is None
    assert len({tuple(s.tolist()) for s in group.sequences}) > 1, "samples are all the same"


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12))
def test_a_vote_is_the_first_of_the_largest_group(answers):
    chosen = baselines.vote(answers, lambda one, other: one == other)
    given_answers = [a for a in answers if a is not None]
    if not given_answers:
        assert chosen == 0
        return
    counts = {a: given_answers.count(a) for a in given_answers}
    winner = max(counts, key=counts.__getitem__)  # dictionaries keep the order of first occurrence
    assert chosen == answers.index(winner)


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_an_answer_does_not_depend_on_the_batch(loaded, method):
    decode = methods.METHODS[method]
    together = outline(decode(batch(loaded, PROMPTS, 3)))
    alone = [outline(decode(batch(loaded, [text], 3)))[0] for text in PROMPTS]
    few = outline(decode(batch(loaded, PROMPTS, 3, size=2)))
    for one, two, three in zip(together, alone, few, strict=True):
        assert one[:2] == two[:2] == three[:2]
        assert one[2] == pytest.approx(two[2]) == pytest.approx(three[2])
        assert one[3] == two[3] == three[3]


def test_nabla_is_generate(models, loaded):
    answers = methods.nabla(batch(loaded, PROMPTS, 4))
    out = nf.generate(*models, PROMPTS, CONFIG.replace(max_rollouts=4))
    assert [a.text for a in answers] == out.texts
    assert [a.reward for a in answers] == out.rewards
    assert [a.stats.counters() for a in answers] == [s.counters() for s in out.stats.sequences]
    plain = nf.generate(*models, PROMPTS, CONFIG.replace(max_rollouts=1))
    assert [a.reward_before for a in answers] == pytest.approx(plain.rewards)
    assert all(a.reward >= a.reward_before for a in answers)
    assert any(a.reward > a.reward_before for a in answers)


def test_greedy_is_the_greedy_baseline(models, loaded):
    answers = methods.greedy(batch(loaded, PROMPTS, 1))
    out = baselines.greedy(*models, PROMPTS, CONFIG)
    assert [a.text for a in answers] == out.texts
    assert [a.reward for a in answers] == pytest.approx(out.rewards)
    assert [a.stats.model_calls for a in answers] == [s.model_calls for s in out.stats.sequences]


def test_every_method_reports_the_same_fields(loaded):
    told = {name: decode(batch(loaded, PROMPTS[:1], 2))[0].to_dict() for name, decode in methods.METHODS.items()}
    names = {frozenset(fields) for fields in told.values()}
    assert len(names) == 1
    assert {"model_calls", "generated_tokens", "reward_calls", "gradient_evaluations", "flops", "seconds"} < set(*names)
    assert all(fields["seconds"] > 0 and fields["flops"] > 0 for fields in told.values())
    assert told["self-consistency"]["reward"] is None


def test_flops_by_hand(loaded):
    size = flops.Sizes(language=100, reward=10, head=40)
    stats = SequenceStats(rollouts=2, generated_tokens=9, reward_calls=2, gradient_evaluations=3, dto_iterations=5)
    stats.revisions.append(Revision(2, 1, 7, 0.0, 1.0, True))
    work = {"prompt": 4, "frame": (6, 1), "response": 5, "conversations": 1}
    rollouts = 2 * 100 * (4 + (4 + 3) + 9)
    rewards = 2 * 10 * (6 + 9 + 2 * 1)
    gradients = 2 * 2 * (100 + 10) * 5 * 3
    head = 4 * 40 * 5
    assert flops.estimate(size, stats, CONFIG, **work) == rollouts + rewards + gradients + head
    # A reward model that takes whole conversations reads opening, answer and closing for every score and gradient.
    whole = flops.estimate(replace(size, continues=False), stats, CONFIG, **work)
    read = stats.reward_calls * (6 + 5 + 1) + 2 * stats.gradient_evaluations * (6 + 1)
    assert whole == rollouts + 2 * 10 * read + gradients + head
    without = flops.estimate(size, stats, CONFIG.replace(parameterization="logits"), **work)
    assert without == rollouts + rewards + gradients
    every_row = flops.estimate(size, stats, CONFIG.replace(update_postfix=True), **work)
    assert every_row == rollouts + rewards + gradients + 5 * head


def test_parameters_without_the_input_embedding(models):
    vocabulary = len(TOKENIZER)
    sizes = {}
    for tied in (True, False):
        model = tiny_language_model("llama", tied=tied)
        found = flops.sizes(methods.load(model, *models[1:]).pair)
        total = sum(weight.numel() for weight in model.parameters())
        assert found.language == (total if tied else total - vocabulary * WIDTH)
        assert found.head == vocabulary * WIDTH
        sizes[tied] = found
    assert sizes[True] == sizes[False]
    reward = sum(weight.numel() for weight in models[2].parameters())
    assert sizes[True].reward == reward - vocabulary * WIDTH
    function = methods.load(models[0], TOKENIZER, lambda embeds, mask: embeds.sum((1, 2)), None)
    assert flops.sizes(function.pair).reward == 0


@pytest.mark.parametrize(("n", "size", "message"), [(0, 1, "n must be at least 1"), (1, 0, "batch_size must be at")])
def test_no_samples_are_refused(models, n, size, message):
    pair = _pair(models)
    with pytest.raises(ValueError, match=message):
        baselines.sample(pair, *_tokens(pair, PROMPTS), n, CONFIG, scored=True, batch_size=size)


def test_inference_mode_of_the_caller_changes_nothing(models):
    expected = baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
    with torch.inference_mode():
        found = baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
    assert found.texts == expected.texts
    assert found.rewards == expected.rewards


def _pair(models):
    from nabla_fast.generate import make_pair

    return make_pair(*models, CONFIG)


def _tokens(pair, prompts):
    return pair.prompts(as_chats(prompts), CONFIG)
