"""The decode loop on tiny random models: what a user may rely on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch

import nabla_fast as nf
from nabla_fast.decoder import Decoder, Sequence
from nabla_fast.generate import make_pair, stop_rule
from nabla_fast.models.backbone import Backbone
from nabla_fast.objective import Objective
from nabla_fast.proposals import PROPOSALS
from nabla_fast.rollout import HFRollout, Rollout, StopRule, hf
from nabla_fast.sampling import Sampler
from nabla_fast.testing.models import DEVICE, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["what is 3 times 4", "the user", "is it on", "12 + 24 ="]
BASE = nf.NablaConfig(
    max_new_tokens=10,
    max_rollouts=5,
    max_iters=6,
    learning_rate=0.2,
    nll_coeff=0.1,
    gradient_threshold=None,
    confidence_threshold=0.99,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
    resample=nf.Sampling(temperature=1.0, top_p=0.95),
)


@lru_cache
def models(family="llama", reward_family="qwen3"):
    tokenizer = tiny_tokenizer()
    return tiny_language_model(family), tokenizer, tiny_reward_model(reward_family), tokenizer


def generate(prompts, config=BASE, **kwargs):
    return nf.generate(*models(**kwargs), prompts, config)


def tokens(output):
    return [sequence.tolist() for sequence in output.sequences]


VARIANTS = [
    {"parameterization": p, "anchor": a, "update_postfix": u}
    for p, a, u in itertools.product(("latents", "logits"), ("argmax", "rollout"), (False, True))
] + [
    {"gumbel_noise": 0.5},
    {"rejection_sampling": False},
    {"gradient_threshold": 0.3},
    {"entropy_threshold": 1.0, "confidence_threshold": None},
    {"gradient_cache": False},
    {"stop_strings": ("e", "12")},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_prompt_gets_in_a_batch_what_it_gets_alone(variant):
    config = BASE.replace(**variant)
    together = generate(PROMPTS, config)
    revised = 0
    for i, prompt in enumerate(PROMPTS):
        alone = generate(prompt, config)
        assert tokens(alone)[0] == tokens(together)[i]
        assert alone.rewards[0] == pytest.approx(together.rewards[i], abs=1e-9)
        assert alone.stats.sequences[0].counters() == together.stats.sequences[i].counters()
        revised += len(alone.stats.sequences[0].revisions)
    assert revised > 0, "no token was ever proposed, so the loop was not tested"


@pytest.mark.parametrize("variant", VARIANTS[:8], ids=str)
def test_cache_on_and_off_give_the_same_tokens(variant):
    config = BASE.replace(**variant, gradient_threshold=0.2)
    cached, fresh = generate(PROMPTS, config), generate(PROMPTS, config.replace(gradient_cache=False))
    assert tokens(cached) == tokens(fresh)
    on, off = cached.stats.totals, fresh.stats.totals
    assert on.cache_hits > 0
    assert on.cache_misses == on.gradient_evaluations < off.gradient_evaluations
    assert on.cache_hits + on.cache_misses == off.gradient_evaluations
    assert off.cache_hits == off.cache_misses == 0


def test_a_tiny_cache_budget_changes_counters_only():
    roomy, tight = generate(PROMPTS), generate(PROMPTS, BASE.replace(gradient_cache_bytes=3000))
    assert tokens(roomy) == tokens(tight)
    assert tight.stats.totals.gradient_evaluations > roomy.stats.totals.gradient_evaluations


def test_the_seed_decides():
    once = tokens(generate(PROMPTS))
    assert once == tokens(generate(PROMPTS))
    assert once != tokens(generate(PROMPTS, BASE.replace(seed=1)))
    repeated = tokens(generate([PROMPTS[0]] * 4))
    assert len({tuple(t) for t in repeated}) > 1, "repeated prompts must get noise of their own"
    assert repeated[0] == tokens(generate(PROMPTS[0]))[0]


@pytest.mark.parametrize("seed", range(4))
def test_rejection_sampling_never_lowers_the_reward(seed):
    plain = generate(PROMPTS, BASE.replace(max_rollouts=1, seed=seed))
    refined = generate(PROMPTS, BASE.replace(seed=seed))
    for i in range(len(PROMPTS)):
        revisions = refined.stats.sequences[i].revisions
        reward = revisions[0].old_reward if revisions else refined.rewards[i]
        assert reward == pytest.approx(plain.rewards[i], abs=1e-9), "equal to rounding in another batch"
        for revision in revisions:
            assert revision.old_reward == reward
            assert revision.accepted == (revision.new_reward > reward)
            reward = max(reward, revision.new_reward)
        assert refined.rewards[i] == reward


def test_without_rejection_every_proposal_is_accepted():
    revisions = generate(PROMPTS, BASE.replace(rejection_sampling=False)).stats.totals.revisions
    assert all(r.accepted for r in revisions)
    assert any(r.new_reward < r.old_reward for r in revisions), "no proposal was worse, so nothing was tested"


def test_the_reward_is_that_of_the_text_as_the_template_writes_it():
    _, tokenizer, reward_model, _ = models()
    output = generate(PROMPTS)
    for prompt, sequence, reward in zip(PROMPTS, output.sequences, output.rewards, strict=True):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        ids = tokenizer(text + "<|start|>assistant\n", add_special_tokens=False)["input_ids"] + sequence.tolist()
        ids += tokenizer("\n" if ids[-1] == tokenizer.eos_token_id else "<|end|>\n")["input_ids"]
        assert reward == pytest.approx(float(reward_model(torch.tensor([ids], device=DEVICE)).logits), abs=1e-9)


@pytest.mark.parametrize("max_rollouts", [1, 2, 3, 7])
def test_limits_and_counters_hold(max_rollouts):
    output = generate(PROMPTS, BASE.replace(max_rollouts=max_rollouts))
    for sequence, stats in zip(output.sequences, output.stats.sequences, strict=True):
        assert 1 <= len(sequence) <= BASE.max_new_tokens
        assert 1 <= stats.reward_calls <= stats.rollouts == 1 + len(stats.revisions) <= max_rollouts
        assert stats.rejections == sum(not r.accepted for r in stats.revisions)
        assert stats.dto_iterations == BASE.max_iters * stats.optimised_positions
        calls = stats.generated_tokens + 4 * stats.gradient_evaluations + stats.reward_calls
        assert stats.model_calls == calls
        assert stats.optimised_positions + stats.skipped_positions <= len(sequence)
    totals = {**output.stats.totals.counters(), **output.stats.totals.passes()}
    for name in totals:
        assert totals[name] == sum(s.to_dict()[name] for s in output.stats.sequences)
    if max_rollouts == 1:
        assert totals["dto_iterations"] == totals["gradient_evaluations"] == 0


def test_without_a_cache_every_rollout_is_scored():
    for stats in generate(PROMPTS, BASE.replace(gradient_cache=False)).stats.sequences:
        assert stats.reward_calls == stats.rollouts


def test_plain_sampling_is_gumbel_max_over_the_models_own_logits():
    model, tokenizer, *_ = models()
    config = BASE.replace(max_rollouts=1)
    from nabla_fast.sampling import draw, sequence_seeds

    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True)
    prompt = list(prompt["input_ids"]) if not isinstance(prompt, list) else prompt
    (seed,) = sequence_seeds(config.seed, [prompt])
    response = []
    while len(response) < config.max_new_tokens and tokenizer.eos_token_id not in response:
        logits = model(torch.tensor([prompt + response])).logits[:, -1, : len(tokenizer)]
        response.append(int(draw(logits, config.rollout, [(seed, len(response))])))
    assert tokens(generate(PROMPTS[0], config))[0] == response


def test_greedy_is_the_argmax_of_transformers_own_generate():
    from nabla_fast import baselines

    model, tokenizer, *rest = models()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    for config in (BASE, BASE.replace(proposal="guided")):
        assert baselines.greedy(model, tokenizer, *rest, PROMPTS[0], config).sequences[0].tolist() == expected.tolist()


def test_a_response_ends_at_any_of_several_end_tokens_and_nowhere_else():
    tokenizer = models()[1]
    ends = tuple(tokenizer.convert_tokens_to_ids(t) for t in ("a", "e", "<|end|>"))
    lengths = set()
    for seed in range(6):
        for sequence in tokens(generate(PROMPTS, BASE.replace(eos_token_ids=ends, seed=seed))):
            assert not set(sequence[:-1]) & set(ends)
            assert sequence[-1] in ends or len(sequence) == BASE.max_new_tokens
            lengths.add(len(sequence))
    assert len(lengths) > 1
    endless = tokens(generate(PROMPTS, BASE.replace(eos_token_ids=())))
    assert all(len(sequence) == BASE.max_new_tokens for sequence in endless)


def test_a_response_ends_with_the_token_that_completes_a_stop_string():
    tokenizer = models()[1]
    stops = ("us", "e", "1", "k")
    ended = 0
    for seed in range(6):
        for sequence in tokens(generate(PROMPTS, BASE.replace(stop_strings=stops, seed=seed))):
            assert not any(stop in tokenizer.decode(sequence[:-1]) for stop in stops)
            ended += any(stop in tokenizer.decode(sequence) for stop in stops)
    assert ended > 6


def test_a_threshold_that_nothing_passes_leaves_the_first_rollout():
    plain = generate(PROMPTS, BASE.replace(max_rollouts=1))
    for thresholds in ({"confidence_threshold": 0.0}, {"entropy_threshold": 99.0}, {"gradient_threshold": 1e9}):
        output = generate(PROMPTS, BASE.replace(**thresholds))
        assert tokens(output) == tokens(plain)
        assert output.stats.totals.optimised_positions == 0
        assert output.stats.totals.skipped_positions == sum(map(len, output.sequences))


def test_selection_takes_the_first_position_that_passes():
    model, tokenizer, *_ = models()
    config = BASE.replace(max_rollouts=1)
    sequence = tokens(generate(PROMPTS[0], config))[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    logits = model(torch.tensor([[*prompt, *sequence]])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    threshold = float(entropy.sort().values[-2]) - 1e-6  # exactly two positions pass
    expected = int((entropy >= threshold).nonzero()[0])
    config = BASE.replace(max_rollouts=2, entropy_threshold=threshold, confidence_threshold=None)
    stats = generate(PROMPTS[0], config).stats.sequences[0]
    if stats.revisions:
        assert stats.revisions[0].position in (entropy >= threshold).nonzero().flatten().tolist()
    assert stats.skipped_positions >= expected
    assert stats.optimised_positions <= 2


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_drafts_and_the_size_of_the_batch_change_nothing(variant, monkeypatch):
    monkeypatch.setitem(hf.TOKENS_PER_PASS, "cpu", 64)
    config = BASE.replace(max_new_tokens=16, draft_tokens=0, **variant)
    plain = generate(PROMPTS, config)
    for changes in ({"draft_tokens": 4}, {"draft_tokens": 4, "max_batch_size": 3}):
        other = generate(PROMPTS, config.replace(**changes))
        assert tokens(other) == tokens(plain)
        for mine, meant in zip(other.stats.sequences, plain.stats.sequences, strict=True):
            # Rewards equal to rounding, everything else exactly.
            assert mine.revisions == [
                replace(r, old_reward=pytest.approx(r.old_reward), new_reward=pytest.approx(r.new_reward))
                for r in meant.revisions
            ]
        a, b = plain.stats.totals, other.stats.totals
        assert a.rollout_calls == a.generated_tokens == b.generated_tokens
        assert b.rollout_calls + b.accepted_draft_tokens == b.generated_tokens
        assert b.drafted_tokens > a.drafted_tokens == 0


def decoded(sequences, config, rollouts=None):
    pair = make_pair(*models(), config)
    objective = Objective(pair.language_model, pair.reward_model, config)
    decoder = Decoder(objective, rollouts or HFRollout(pair.language_model), Sampler(), StopRule(frozenset()))
    decoder.decode(sequences)


def begun(count, limit=6):
    frame = make_pair(*models(), BASE).reward_model.chat_frame([{"role": "user", "content": "is"}])
    return [Sequence((5, 6, 7 + i), (), i, limit, frame, index=i) for i in range(count)]


def test_no_more_sequences_are_under_way_than_allowed():
    """And no fewer, while there are more to come."""
    under_way = []

    class Counting:
        def __init__(self, backend):
            self.backend, self.rolling = backend, set()

        def open(self, sampling, stop):
            self.stream = self.backend.open(sampling, stop)
            return self

        def submit(self, sequence):
            self.rolling.add(sequence)
            under_way.append(len(self.rolling))
            self.stream.submit(sequence)

        def collect(self):
            ended = self.stream.collect()
            self.rolling -= {sequence for sequence, _ in ended}
            return ended

        def close(self):
            self.stream.close()

    config = BASE.replace(max_batch_size=3)
    sequences = begun(8)
    decoded(sequences, config, Counting(make_pair(*models(), config).rollouts(config)))
    assert max(under_way) == 3
    assert all(sequence.finished for sequence in sequences)


def test_the_first_gradient_needs_no_prefill(monkeypatch):
    model = models()[0]
    from_nothing = []
    extend = Backbone.extend

    def counted(self, caches, embeds):
        if self.model is model:
            from_nothing.extend(cache is None for cache in caches)
        return extend(self, caches, embeds)

    sequences = begun(3)
    monkeypatch.setattr(Backbone, "extend", counted)
    decoded(sequences, BASE)
    assert sum(sequence.stats.gradient_evaluations for sequence in sequences) > 3
    assert sum(from_nothing) == len(sequences), "the prompt of each, once"


def test_no_sequence_waits_for_another():
    """The second prompt's answer is ten times as long: the first is done before the second's first rollout is."""
    heard = []

    class Listener:
        def on_phase(self, phase, sequences):
            pass

        def on_commit(self, index, new, length):
            heard.append(index)

    pair = make_pair(*models(), BASE)
    frame = pair.reward_model.chat_frame([{"role": "user", "content": "is"}])
    sequences = [Sequence((5, 6), (), 1 + i, limit, frame, index=i) for i, limit in enumerate((4, 40))]
    never = StopRule(frozenset())
    objective = Objective(pair.language_model, pair.reward_model, BASE)
    Decoder(objective, HFRollout(pair.language_model), Sampler(), never, Listener()).decode(sequences)
    assert len(sequences[0].stats.revisions) > 2
    assert heard == sorted(heard)


class Scripted:
    """Rollouts by script: continues any prefix with the digits that follow in ``script``; its own stream."""

    def __init__(self, script, hidden):
        self.script, self.hidden, self.asked, self.ended = iter(script), hidden, [], []

    def open(self, sampling, stop):
        return self

    def submit(self, sequence):
        self.asked.append((sequence.prefix, tuple(sequence.drawn)))
        tokens = torch.tensor(next(self.script), dtype=torch.long)
        self.ended.append((sequence, Rollout(tokens, self.hidden[: len(tokens)])))

    def collect(self):
        ended, self.ended = self.ended, []
        return ended

    def close(self):
        self.closed = True


def scripted_decode(script, rewards, resampled, config):
    """Runs one sequence with given rollouts, rewards and tokens to try; nothing is optimized."""
    pair = make_pair(*models(), config)
    objective = Objective(pair.language_model, pair.reward_model, config)
    given = iter(rewards)
    objective.rewards = lambda sequences, responses: [next(given) for _ in responses]
    hidden = torch.randn(8, pair.language_model.head.weight.shape[1], dtype=torch.float64)
    rollouts = Scripted(script, hidden)
    decoder = Decoder(objective, rollouts, Sampler(), stop_rule(pair, config))
    proposals = iter(resampled)
    frame = pair.reward_model.chat_frame([{"role": "user", "content": "is"}])
    sequence = Sequence((5, 6), (), 1, 8, frame)
    with mock.patch.dict(PROPOSALS, {config.proposal: lambda sequences, by: [next(proposals) for _ in sequences]}):
        decoder.decode([sequence])
    assert rollouts.closed
    return sequence, rollouts.asked


def test_a_rollout_of_a_sequence_that_is_not_under_way_is_an_error():
    class Twice(Scripted):
        def collect(self):
            return super().collect() * 2

    hidden = torch.randn(8, make_pair(*models(), BASE).language_model.head.weight.shape[1], dtype=torch.float64)
    with pytest.raises(KeyError):
        decoded(begun(1), BASE, Twice([[10, 11, 12]], hidden))


def test_a_scripted_decode_commits_accepts_and_rejects_as_designed():
    config = BASE.replace(max_rollouts=4, confidence_threshold=None, max_iters=1)
    sequence, asked = scripted_decode(
        script=[[10, 11, 12], [21, 22], [31], [42]],
        rewards=[1.0, 0.5, 2.0, 3.0],
        #        kept  rejected accepted ...
        resampled=[10, 20, 30, 41],
        config=config,
    )
    # 10 stays; 20 in place of 11 is rejected, so 11 is committed; 30 in place of 12 is accepted with 31 behind it; 41
    # in place of 31 is accepted with 42 behind it; the four rollouts are used up and 42 is committed.
    # Each with the trajectory of the moment first.
    first, second, third = (10, 11, 12), (10, 20, 21, 22), (10, 11, 30, 31)
    assert asked == [
        ((), ()),
        ((10, 20), (first,)),
        ((10, 11, 30), (first, second)),
        ((10, 11, 30, 41), (third, first, second)),
    ]
    assert sequence.current.tokens.tolist() == [10, 11, 30, 41, 42]
    assert sequence.current.reward == 3.0
    assert [(r.position, r.old_token, r.new_token, r.accepted) for r in sequence.stats.revisions] == [
        (1, 11, 20, False),
        (2, 12, 30, True),
        (3, 31, 41, True),
    ]
    assert (sequence.stats.rollouts, sequence.stats.rejections, sequence.stats.optimised_positions) == (4, 1, 4)


def test_an_equal_reward_does_not_replace():
    config = BASE.replace(max_rollouts=2, confidence_threshold=None, max_iters=1)
    sequence, _ = scripted_decode([[10, 11], [12, 13]], [1.0, 1.0], [20], config)
    assert sequence.current.tokens.tolist() == [10, 11]


def test_a_proposal_that_ends_the_response_shortens_it():
    config = BASE.replace(max_rollouts=3, confidence_threshold=None, max_iters=1)
    sequence, _ = scripted_decode([[10, 11, 12], []], [1.0, 2.0], [10, 3], config)
    assert sequence.current.tokens.tolist() == [10, 3]


def test_rollouts_do_not_touch_the_models():
    model, _, reward_model, _ = models()
    before = [p.clone() for p in (*model.parameters(), *reward_model.parameters())]
    generate(PROMPTS)
    assert all(p.grad is None for p in (*model.parameters(), *reward_model.parameters()))
    after = (*model.parameters(), *reward_model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_works_inside_inference_mode_and_no_grad():
    expected = tokens(generate(PROMPTS[:2]))
    with torch.inference_mode():
        assert tokens(generate(PROMPTS[:2])) == expected
    with torch.no_grad():
        assert tokens(generate(PROMPTS[:2])) == expected


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "qwen2"])
def test_every_family_decodes_alone_as_in_a_batch(family):
    # Some of these are so sure of themselves that only a hot, fast optimization moves them.
    hot = nf.Sampling(temperature=4.0)
    config = BASE.replace(learning_rate=2.0, reward_coeff=20.0, rollout=hot, resample=hot)
    together = generate(PROMPTS, config, family=family, reward_family=family)
    assert together.stats.totals.revisions
    for i, prompt in enumerate(PROMPTS):
        assert tokens(generate(prompt, config, family=family, reward_family=family))[0] == tokens(together)[i]


def test_the_observer_hears_every_token_once_and_in_order():
    heard = {}

    class Listener:
        def on_phase(self, phase, sequences):
            assert sequences > 0

        def on_commit(self, index, new, length):
            heard.setdefault(index, []).extend(new)
            assert len(heard[index]) <= length

    output = nf.generate(*models(), PROMPTS, BASE, observer=Listener())
    assert [heard[i] for i in range(len(PROMPTS))] == tokens(output)
