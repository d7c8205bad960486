"""Searches over steps against plain loops: beam search on whole sequences without a cache, MCTS by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from other_models import other_language_model

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.generate import make_pair, stop_rule
from nabla_fast.models.chat import as_chats
from nabla_fast.sampling import Sampler, sequence_seeds
from nabla_fast.search import Prompt, Response, beam_search, mcts, run
from nabla_fast.search.base import StepRule
from nabla_fast.search.beam import shape
from nabla_fast.search.mcts import Node, uct
from nabla_fast.search_config import SearchConfig
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import shared_language_model, shared_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
PROMPTS = ["what is 3 times 4", "is it on", "the user"]
CONFIG = nf.NablaConfig(max_new_tokens=9, rollout=nf.Sampling(temperature=1.0), seed=3)
STEPS = SearchConfig(search_separator="", search_tokens=3, search_width=2)


@pytest.fixture(scope="module")
def pair():
    return make_pair(shared_language_model("llama"), TOKENIZER, shared_reward_model("qwen3"), TOKENIZER, CONFIG)


def searched(pair, method, n, *, prompts=PROMPTS, config=CONFIG, settings=STEPS, size=None, enough=None):
    ids, frames = pair.prompts(as_chats(prompts), config)
    find = partial({"beam": beam_search, "mcts": mcts}[method], n=n, settings=settings, enough=enough)
    return run(pair, ids, frames, config, settings, find, steps=method == "beam", batch_size=size)


class Plain:
    """One prompt, by whole passes of both models without a cache."""

    def __init__(self, pair, text, config, settings):
        ids, (self.frame,) = pair.prompts(as_chats(text), config)
        self.pair, self.config, self.settings, self.prompt = pair, config, settings, ids[0]
        self.seed = sequence_seeds(config.seed, ids)[0]
        self.stop = stop_rule(pair, config)
        self.tokens = self.calls = 0
        self.scored = {}

    def finished(self, response):
        return len(response) >= self.config.max_new_tokens or response[-1] in self.stop.eos_token_ids

    def is_step(self, step):
        text = TOKENIZER.decode(list(step)).lstrip()
        separator = self.settings.search_separator
        return len(step) >= self.settings.search_tokens or (separator != "" and separator in text)

    def draw(self, prefix, seed, *, whole=False):
        """A step behind a response, or all the rest."""
        response = tuple(prefix)
        sequence = Sequence(self.prompt, (), seed, self.config.max_new_tokens)
        while True:
            with torch.no_grad():
                ids = torch.tensor([[*self.prompt, *response]])
                logits = self.pair.language_model.model(ids).logits[0, -1:, : len(TOKENIZER)]
            response += tuple(Sampler()(logits, self.config.rollout, [sequence], [response]).tolist())
            self.tokens += 1
            if self.finished(response) or (not whole and self.is_step(response[len(prefix) :])):
                return response

    def reward(self, response):
        if response not in self.scored:
            with torch.no_grad():
                ended = self.finished(response)
                conversation = self.pair.reward_model.conversation(self.frame, torch.tensor(response), ended=ended)
                self.scored[response] = float(self.pair.reward_model.rewards([conversation])[0])
        return self.scored[response]

    def seeds(self, response, count):
        if response:
            return sequence_seeds(self.seed, [(*self.prompt, *response)] * count)
        return [self.seed, *sequence_seeds(self.seed, [self.prompt] * (count - 1))]

    def beam_search(self, n):
        beams, width = max(1, n // self.settings.search_width), n // max(1, n // self.settings.search_width)
        kept, complete, draws = [()], [], 0
        while any(not (one and self.finished(one)) for one in kept):
            candidates = [one for one in kept if one and self.finished(one)]
            later = []
            for one in kept:
                if one in candidates:
                    continue
                for seed in self.seeds(one, width if one else beams * width):
                    draws += 1
                    later.append(self.draw(one, seed))
            complete += [one for one in later if self.finished(one)]
            candidates += [one for one in later if self.finished(one)] + [o for o in later if not self.finished(o)]
            candidates = list(dict.fromkeys(candidates))
            kept = sorted(candidates, key=lambda one: -self.reward(one))[:beams]
        return max(complete, key=self.reward), draws

    def mcts(self, n):
        """A tree as a dictionary: node → what it holds; nodes are responses."""
        tree = {(): {"children": [], "draws": 0, "visits": 0, "total": 0.0}}
        rewards, best = [], None
        for _ in range(n):
            path = [()]
            while True:
                node = tree[path[-1]]
                going = [child for child in node["children"] if not tree[child]["ends"]]
                if node["draws"] < self.settings.search_width or not going:
                    break
                low, high = min(rewards), max(rewards)

                def value(child, low=low, high=high, above=node["visits"]):
                    own = tree[child]
                    mean = own["total"] / own["visits"]
                    scaled = (mean - low) / (high - low) if high > low else 0.5
                    return scaled + self.settings.exploration * math.sqrt(math.log(above) / own["visits"])

                path.append(max(going, key=value))
            leaf, before = tree[path[-1]], path[-1]
            leaf["draws"] += 1
            whole = self.draw(before, self.seeds(before, leaf["draws"])[-1], whole=True)
            lengths = range(len(before) + 1, len(whole) + 1)
            end = next((k for k in lengths if self.is_step(whole[len(before) : k])), len(whole))
            child = whole[:end]
            if child not in leaf["children"]:
                leaf["children"].append(child)
                tree[child] = {"children": [], "draws": 0, "visits": 0, "total": 0.0, "ends": end == len(whole)}
            rewards.append(self.reward(whole))
            for one in (*path, child):
                tree[one]["visits"] += 1
                tree[one]["total"] += rewards[-1]
            if best is None or self.reward(whole) > self.reward(best):
                best = whole
        return best, n


@pytest.mark.parametrize("separator", ["", "e"])
@pytest.mark.parametrize(("method", "n"), [("beam", 1), ("beam", 3), ("beam", 6), ("mcts", 1), ("mcts", 9)])
def test_a_search_is_a_plain_loop(pair, method, n, separator):
    settings = replace(STEPS, search_separator=separator)
    for text, (prompt, found) in zip(PROMPTS, searched(pair, method, n, settings=settings), strict=True):
        plain = Plain(pair, text, CONFIG, settings)
        response, draws = getattr(plain, "beam_search" if method == "beam" else method)(n)
        assert found.tokens == response
        assert found.reward == pytest.approx(plain.reward(response))
        assert found.finished
        stats = prompt.stats
        assert (stats.rollouts, stats.generated_tokens) == (draws, plain.tokens)
        assert stats.reward_calls == len(plain.scored)
        assert stats.prefix_rewards == sum(not plain.finished(one) for one in plain.scored)
        assert prompt.rewards == pytest.approx(plain.scored)


def test_separators_end_steps_in_these_responses(pair):
    """Otherwise the test above would not see them."""
    settings = replace(STEPS, search_separator="e", search_tokens=9)
    plain = Plain(pair, PROMPTS[0], CONFIG, settings)
    steps = [plain.draw((), seed) for seed in plain.seeds((), 12)]
    assert any(len(step) < 9 and not plain.finished(step) for step in steps)


@pytest.mark.parametrize("method", ["beam", "mcts"])
def test_an_answer_does_not_depend_on_the_batch(pair, method):
    together = searched(pair, method, 6)
    for size in (1, 4):
        few = searched(pair, method, 6, size=size)
        for (one, ours), (other, theirs) in zip(together, few, strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.reward == pytest.approx(theirs.reward)
            assert one.stats.counters() == other.stats.counters()
            assert (one.language_tokens, one.reward_tokens) == (other.language_tokens, other.reward_tokens)
    for text, (one, ours) in zip(PROMPTS, together, strict=True):
        ((other, theirs),) = searched(pair, method, 6, prompts=[text])
        assert ours.tokens == theirs.tokens
        assert one.stats.counters() == other.stats.counters()


@pytest.mark.parametrize("name", ["beam_search", "mcts"])
def test_the_function_for_a_pair_of_models_is_the_search(pair, name):
    models = shared_language_model("llama"), TOKENIZER, shared_reward_model("qwen3"), TOKENIZER
    out = getattr(baselines, name)(*models, PROMPTS, 4, CONFIG, STEPS)
    for i, (prompt, found) in enumerate(searched(pair, name.removesuffix("_search"), 4)):
        assert tuple(out.sequences[i].tolist()) == found.tokens
        assert out.rewards[i] == pytest.approx(found.reward)
        assert out.texts[i] == TOKENIZER.decode(found.tokens, skip_special_tokens=True)
        assert out.stats.sequences[i].counters() == prompt.stats.counters()
        assert out.stats.sequences[i].finish_reason == ("stop" if found.tokens[-1] in pair.eos_token_ids else "length")
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        getattr(baselines, name)(*models, PROMPTS, 0, CONFIG, STEPS)


@pytest.mark.parametrize("method", ["beam", "mcts"])
def test_with_steps_as_long_as_responses_both_are_best_of_n(pair, method):
    settings = SearchConfig(search_separator="", search_tokens=9, search_width=2)
    ids, frames = pair.prompts(as_chats(PROMPTS), CONFIG)
    samples = baselines.sample(pair, ids, frames, 4, CONFIG, scored=True)
    for group, (prompt, found) in zip(samples, searched(pair, method, 4, settings=settings), strict=True):
        assert found.tokens == tuple(group.sequences[baselines.best(group)].tolist())
        assert prompt.stats.generated_tokens == group.stats.generated_tokens
        assert next(iter(prompt.rewards.values())) == pytest.approx(group.rewards[0])


@pytest.mark.parametrize("method", ["beam", "mcts"])
def test_tokens_are_counted_as_the_models_read_them(pair, method, monkeypatch):
    """What goes through the backbones: padding and the prediction that nobody asks for left out."""
    read = {"language": 0, "reward": 0}
    for name, backbone in (("language", pair.language_model.backbone), ("reward", pair.reward_model.backbone)):

        def extend(caches, inputs, backbone=backbone, name=name):
            read[name] += sum(len(x) for x in inputs)
            return type(backbone)._extend_batch(backbone, caches, inputs)

        monkeypatch.setattr(backbone, "_extend_batch", extend, raising=False)
    ((prompt, _),) = searched(pair, method, 6, prompts=PROMPTS[:1])
    # Each generated token is one of a decode step, which is no pass of the backbone's own.
    assert prompt.language_tokens - prompt.stats.generated_tokens == read["language"]
    # A response that ends with the closing's first token keeps one of the two.
    ends = sum(tokens[-1] in pair.eos_token_ids for tokens in prompt.rewards)
    assert 0 <= prompt.reward_tokens - read["reward"] <= ends
    whole = sum(len(frame_tokens(pair, PROMPTS[0])) + len(tokens) for tokens in prompt.rewards)
    assert prompt.reward_tokens < whole, "nothing was read behind a cache"


def frame_tokens(pair, text):
    _, (frame,) = pair.prompts(as_chats(text), CONFIG)
    return [*frame.opening.ids.tolist(), *frame.closing.ids.tolist()]


@pytest.mark.parametrize("method", ["beam", "mcts"])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_models_without_a_cache_that_can_be_cropped_find_the_same(method, family):
    """A function as reward model reads whole conversations; a recurrent model cannot go back."""
    model = other_language_model(family) if family == "mamba" else shared_language_model(family)
    seven = model.get_input_embeddings().weight[7]

    def score(inputs_embeds, attention_mask):
        near = -(inputs_embeds - seven).square().sum(-1)
        return (near * attention_mask).sum(-1)

    pair = make_pair(model, TOKENIZER, score, None, CONFIG)
    ((prompt, found),) = searched(pair, method, 4, prompts=PROMPTS[:1])
    plain = Plain(pair, PROMPTS[0], CONFIG, STEPS)
    response, _ = getattr(plain, "beam_search" if method == "beam" else method)(4)
    assert found.tokens == response
    if family == "mamba":
        assert prompt.language_tokens >= prompt.stats.generated_tokens + len(prompt.sequence.prompt_ids)


def test_shapes_of_beams():
    settings = SearchConfig(search_width=4)
    assert [shape(n, settings) for n in (1, 3, 4, 7, 8, 16, 18)] == [
        (1, 1),
        (1, 3),
        (1, 4),
        (1, 7),
        (2, 4),
        (4, 4),
        (4, 4),
    ]


def test_uct_by_hand():
    parent = Node(Response(()), visits=5)
    child = Node(Response((1,)), visits=2, total=3.0)
    # The mean, 1.5, is halfway between 1 and 2.
    assert uct(child, parent, [1.0, 2.0], 0.7) == pytest.approx(0.5 + 0.7 * math.sqrt(math.log(5) / 2))
    assert uct(child, parent, [1.5, 1.5], 0.0) == 0.5


def test_the_bookkeeping_of_a_tree():
    """Four simulations with made-up rollouts: a step is two tokens, a response four."""
    rule = StepRule(frozenset(), separator="", most=2)
    prompt = Prompt(Sequence((9,), (), 0, 4), rule, rule)
    settings = SearchConfig(search_width=2, exploration=0.5)
    search = mcts(prompt, 5, settings)
    # The root has two children after two draws. Of these 2 has the better mean, so that it is continued. Then its mean
    # is (3 + 0) / 2, scaled 0.5, and it has two visits; 1 has 1/3 and one. 0.5 + 0.5 sqrt(ln 3 / 2) = 0.87 is more
    # than 1/3 + 0.5 sqrt(ln 3) = 0.86. So 2 once more. Then it has (3 + 0 + 4) / 3 / 4 + 0.5 sqrt(ln 4 / 3) = 0.92, and
    # 1 has 0.25 + 0.5 sqrt(ln 4) = 0.84; since both children of 2 are complete, it draws a third.
    script = [((), 11, 1.0), ((), 22, 3.0), ((2, 2), 22, 0.0), ((2, 2), 33, 4.0), ((2, 2), 55, 2.0)]
    asked, seeds = next(search), []
    for parent, more, reward in script:
        (draw,) = asked
        assert draw.parent.tokens == parent
        seeds.append(draw.seed)
        tokens = (*(parent or (more // 10,) * 2), more // 10, more % 10)
        response = Response(tokens, finished=True, reward=reward)
        if len(seeds) < len(script):
            asked = search.send([response])
    with pytest.raises(StopIteration) as end:
        search.send([response])
    assert end.value.value.tokens == (2, 2, 3, 3)
    assert len(set(seeds)) == 5


def test_seeds_differ_between_expansions():
    rule = StepRule(frozenset(), separator="", most=2)
    prompt = Prompt(Sequence((9,), (), 5, 8), rule, rule)
    responses = [(), (1, 2), (1, 3)]
    drawn = list(itertools.chain.from_iterable(prompt.seeds(one, 4) for one in responses))
    assert len(set(drawn)) == 12
    assert drawn[0] == 5
    assert prompt.seeds((1, 2), 2) == prompt.seeds((1, 2), 4)[:2]


@pytest.mark.parametrize(
    ("tokens", "ends"), [([], False), (["3"], False), (["\n"], False), (["\n", "3", "\n"], True), (["3", "3"], False)]
)
def test_white_space_alone_is_no_step(tokens, ends):
    class Words:
        def decode(self, ids):
            return "".join({0: "\n", 3: "3"}[i] for i in ids)

    rule = StepRule(frozenset(), (), Words(), (), "\n", 4)
    ids = tuple({"\n": 0, "3": 3}[token] for token in tokens)
    assert rule.is_step(ids) == ends
    sequence = Sequence((9,), (0, 0), 0, 99)
    assert rule.ended(sequence, (0, 0, *ids)) == ends
    assert rule.is_step((3, 3, 3, 3))


@pytest.mark.parametrize("method", ["beam", "mcts"])
def test_a_search_stops_with_its_budget_and_goes_on_below_it(pair, method):
    spent = {}
    for calls in (1, 40, 120, 300):
        results = searched(pair, method, 4, enough=lambda prompt, calls=calls: prompt.stats.model_calls >= calls)
        for i, (prompt, found) in enumerate(results):
            assert found.finished
            assert found.reward == pytest.approx(max(r for t, r in prompt.rewards.items() if ended(pair, t)))
            assert prompt.stats.model_calls >= calls
            unit = 4 * (3 + 1) if method == "beam" else 9 + 1
            assert prompt.stats.model_calls < calls + unit + (9 if method == "beam" else 0)
            assert prompt.stats.model_calls >= spent.get(i, (0, -math.inf))[0]
            spent[i] = prompt.stats.model_calls, found.reward
    alone = searched(pair, method, 4, prompts=PROMPTS[:1], enough=lambda prompt: prompt.stats.model_calls >= 300)
    assert (alone[0][0].stats.model_calls, alone[0][1].reward) == pytest.approx(spent[0])


def ended(pair, tokens):
    return len(tokens) == CONFIG.max_new_tokens or tokens[-1] in pair.eos_token_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search_tokens": 0}, "search_tokens must be"),
        ({"search_width": 0}, "search_width must be"),
        ({"exploration": -1.0}, "exploration must be"),
        ({"search_separator": 3}, "search_separator must be a string, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SearchConfig(**change)


def test_no_batch_is_refused(pair):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        searched(pair, "beam", 2, size=0)
