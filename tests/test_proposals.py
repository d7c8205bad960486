"""Proposals against their meaning in plain PyTorch on whole sequences, and decodes that use them."""

from __future__ import annotations

import pytest
import torch
from dense_dto import DensePair, partners
from processed import Processed

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.objective import Objective
from nabla_fast.proposals import GuidedSampler, Proposer, first_order, likeliest, prefix_reward
from nabla_fast.sampling import Sampler, sequence_seeds
from nabla_fast.sequence import Sequence, Trajectory
from nabla_fast.testing.models import prompt_ids, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MESSAGES = [{"role": "user", "content": "is it on"}]
CONFIG = nf.NablaConfig(nll_coeff=0.3, reward_coeff=1.7, candidates=4)
PROMPTS = ["what is 3 times 4", "the user", "is it on"]
RESPONSES = ([9, 12, 30, 7, 15], [20, 21, 22, 23])
DECODE = nf.NablaConfig(
    max_new_tokens=8,
    max_rollouts=4,
    confidence_threshold=0.99,
    gradient_threshold=None,
    max_iters=3,
    learning_rate=0.2,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
)


def forbidding(token):
    """A logits processor that forbids one token."""

    def process(input_ids, scores):
        scores[:, token] = -torch.inf
        return scores

    return process


class Case:
    """Two responses of a pair of models, at a position each, and the oracle of the same pair."""

    def __init__(self, family="llama", reward_family="qwen3", **changes):
        model, reward = tiny_language_model(family), tiny_reward_model(reward_family)
        self.config = CONFIG.replace(**changes)
        self.pair = make_pair(model, TOKENIZER, reward, TOKENIZER, self.config)
        self.objective = Objective(self.pair.language_model, self.pair.reward_model, self.config)
        frame = self.pair.reward_model.chat_frame(MESSAGES)
        prompt = tuple(prompt_ids(TOKENIZER, MESSAGES))
        closing = frame.closing.ids.tolist()
        opening = frame.opening.ids.tolist()
        self.dense = DensePair(model, reward, V, list(prompt), opening, closing, partners(TOKENIZER, TOKENIZER))
        self.sequences = [self.sequence(prompt, frame, list(y), at) for y, at in zip(RESPONSES, (2, 0), strict=True)]
        self.by = self.proposer(Sampler())

    def proposer(self, sampler):
        return Proposer(
            self.objective, sampler, lambda name, some: self.objective.clock.phase(name, [s.stats for s in some])
        )

    def sequence(self, prompt, frame, response, position):
        table = self.pair.language_model.model.get_input_embeddings()
        ids = torch.tensor([[*prompt, *response]])
        hidden = self.pair.language_model.model.model(inputs_embeds=table(ids), use_cache=False).last_hidden_state[0]
        tokens = torch.tensor(response)
        latents = hidden[len(prompt) - 1 : -1]
        sequence = Sequence(prompt, (), sequence_seeds(0, [prompt])[0], 9, frame, position=position)
        sequence.trajectory = Trajectory(tokens, latents, tokens, torch.ones(len(tokens), dtype=torch.bool), 0.0)
        return sequence

    def logits(self, sequence):
        with torch.no_grad():
            return self.dense.logits(sequence.current.latents[sequence.position])

    def prefix_reward(self, sequence, token):
        """The dense reward model's score of the response so far with ``token`` behind it."""
        prefix = sequence.committed
        with torch.no_grad():
            return float(self.dense.reward(prefix, torch.eye(V, dtype=torch.float64)[[token]], ended=False))


def test_the_likeliest_other_token_is_tried():
    case = Case()
    expected = []
    for sequence in case.sequences:
        z = case.logits(sequence)
        z[int(sequence.current.tokens[sequence.position])] = -torch.inf
        expected.append(int(z.argmax()))
    assert likeliest(case.sequences, case.by) == expected
    assert all(s.stats.model_calls == 0 for s in case.sequences)
    # What a logits processor forbids is not tried, and where it allows one token there is no other.
    sampler = Processed(before=(forbidding(expected[0]),))
    assert likeliest(case.sequences[:1], case.proposer(sampler))[0] not in (expected[0], 30)
    alone = Processed(before=(forbidding([t for t in range(V) if t != 30]),))
    assert likeliest(case.sequences[:1], case.proposer(alone)) == [30]


@pytest.mark.parametrize("pair", [("llama", "qwen3"), ("gemma2", "llama")], ids=str)
def test_first_order_is_the_gradient_of_the_whole_objective(pair):
    case = Case(*pair)
    expected, differ = [], 0
    for sequence in case.sequences:
        t, response = sequence.position, sequence.current.tokens
        ahead = torch.nn.functional.one_hot(response[t:], V).double().requires_grad_()
        prefix = response[:t].tolist()
        value = -CONFIG.nll_coeff * case.dense.log_likelihood(prefix, ahead)
        value = value - CONFIG.reward_coeff * case.dense.reward(prefix, ahead)
        gradient = torch.autograd.grad(value, ahead)[0][0]
        candidates = [int(response[t]), *case.logits(sequence).topk(4).indices.tolist()]
        expected.append(min(candidates, key=lambda token, g=gradient: float(g[token])))
        differ += expected[-1] != int(response[t])
    assert differ, "every present token was the best, so nothing was tried"
    assert first_order(case.sequences, case.by) == expected
    assert [s.stats.gradient_evaluations for s in case.sequences] == [1, 1]


@pytest.mark.parametrize("cache", [False, True])
def test_prefix_rewards_are_those_of_the_response_cut_there(cache):
    case = Case(gradient_cache=cache)
    expected = []
    for sequence in case.sequences:
        candidates = [int(sequence.current.tokens[sequence.position]), *case.logits(sequence).topk(4).indices.tolist()]
        expected.append(max(dict.fromkeys(candidates), key=lambda token, s=sequence: case.prefix_reward(s, token)))
    assert prefix_reward(case.sequences, case.by) == expected
    for sequence in case.sequences:
        assert sequence.stats.prefix_rewards == sequence.stats.reward_calls
        assert 4 <= sequence.stats.reward_calls <= 5
    # A prefix's reward is none of a response that ends with the same token.
    sequence = case.sequences[0]
    prefix = torch.tensor([*sequence.committed, 7])
    (whole,) = case.objective.rewards([sequence], [prefix])
    ((part,),) = case.objective.prefix_rewards([sequence], [prefix[:-1]], [[7]])
    assert whole == case.objective.rewards([sequence], [prefix])[0]
    assert abs(whole - part) > 1e-6
    assert part == pytest.approx(case.prefix_reward(sequence, 7), abs=1e-9)


def test_a_prefix_is_read_once_for_all_its_candidates(monkeypatch):
    """The reward model's passes: what is new of the prefixes, then a token for each candidate."""
    case = Case(gradient_cache=False)
    backbone, passes = case.pair.reward_model.backbone, []
    own = type(backbone).__call__

    def counted(self, caches, inputs, **options):
        passes.append([len(x) for x in inputs])
        return own(self, caches, inputs, **options)

    monkeypatch.setattr(type(backbone), "__call__", counted)
    sequence = case.sequences[0]
    case.objective.prefix_rewards([sequence], [sequence.current.tokens[:3]], [[7, 8, 9]])
    assert passes[-1] == [1] * 3
    passes.clear()
    case.objective.prefix_rewards([sequence], [sequence.current.tokens[:4]], [[7, 8]])
    assert passes[-1] == [1] * 2


def test_a_guided_decode_takes_the_best_prefix_where_it_is_uncertain():
    """Token by token, with the reward model run on every whole prefix."""
    config = DECODE.replace(proposal="guided", candidates=3, confidence_threshold=0.5, seed=4)
    case = Case(**{name: getattr(config, name) for name in ("candidates", "confidence_threshold")})
    first = case.sequences[0]
    case.dense.prompt = list(first.prompt_ids)
    response, forks = [], 0
    plain = Sampler()
    sequence = Sequence(first.prompt_ids, (), sequence_seeds(4, [first.prompt_ids])[0], 8, first.frame)
    while len(response) < 8 and (not response or response[-1] not in case.pair.eos_token_ids):
        ids = torch.tensor([[*first.prompt_ids, *response]])
        with torch.no_grad():
            logits = case.pair.language_model.model(ids).logits[0, -1:, :V]
        (token,) = plain(logits, config.rollout, [sequence], [tuple(response)]).tolist()
        if float(logits.softmax(-1).max()) <= 0.5:
            forks += 1
            sequence.trajectory = Trajectory(torch.tensor([*response, 0]), logits, ids, ids, 0.0)
            sequence.position = len(response)
            token = max(logits[0].topk(3).indices.tolist(), key=lambda t: case.prefix_reward(sequence, t))
        response.append(token)
    assert forks >= 2
    out = nf.generate(case.dense.language_model, TOKENIZER, case.dense.reward_model, TOKENIZER, MESSAGES, config)
    assert out.sequences[0].tolist() == response
    stats = out.stats.sequences[0]
    assert (stats.rollouts, stats.prefix_rewards, stats.gradient_evaluations) == (1, 3 * forks, 0)


@pytest.mark.parametrize("proposal", ["first_order", "prefix_reward", "likeliest", "guided"])
def test_every_prompt_gets_in_a_batch_what_it_gets_alone(proposal):
    config = DECODE.replace(proposal=proposal)
    models = tiny_language_model("llama"), TOKENIZER, tiny_reward_model("qwen3"), TOKENIZER
    together = nf.generate(*models, PROMPTS, config)
    tried = 0
    for i, prompt in enumerate(PROMPTS):
        alone = nf.generate(*models, prompt, config)
        assert alone.sequences[0].tolist() == together.sequences[i].tolist()
        assert alone.stats.sequences[0].counters() == together.stats.sequences[i].counters()
        assert all(one.old_token != one.new_token for one in alone.stats.sequences[0].revisions)
        tried += alone.stats.sequences[0].optimised_positions + alone.stats.sequences[0].prefix_rewards
        assert (alone.stats.sequences[0].gradient_evaluations > 0) <= (proposal == "first_order")
    assert tried


def test_a_threshold_of_gradients_asks_for_none_where_the_proposal_takes_none():
    config = DECODE.replace(proposal="likeliest", gradient_threshold=0.1)
    out = nf.generate(tiny_language_model("llama"), TOKENIZER, tiny_reward_model("qwen3"), TOKENIZER, PROMPTS, config)
    assert out.stats.totals.gradient_evaluations == 0
    assert out.stats.totals.revisions


@pytest.mark.parametrize("proposal", ["prefix_reward", "guided"])
def test_a_function_as_reward_model_may_choose_by_prefixes(proposal):
    """It reads whole conversations, by the language model's embeddings: here the more of token 7, the better."""
    model = tiny_language_model("llama")
    seven = model.get_input_embeddings().weight[7]

    def score(inputs_embeds, attention_mask):
        return ((inputs_embeds - seven).abs().sum(-1) == 0).double().mul(attention_mask).sum(-1)

    def answer(**changes):
        config = DECODE.replace(candidates=V, confidence_threshold=None, gradient_threshold=None, **changes)
        return nf.generate(model, TOKENIZER, score, None, "is it on", config)

    assert answer(proposal="likeliest", max_rollouts=1).rewards[0] <= 2
    best = answer(proposal=proposal, max_rollouts=9)
    assert best.sequences[0].tolist() == [7] * 8
    assert best.rewards[0] >= 8
    assert best.stats.totals.gradient_evaluations == 0


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"proposal must be one of dto, first_order, .*guided.* got 'best'"):
        nf.NablaConfig(proposal="best")
    with pytest.raises(ValueError, match=r"candidates must be .*at least 1"):
        nf.NablaConfig(candidates=0)
    for options in ({"rollout_backend": "vllm"}, {"vllm_url": "http://127.0.0.1:1"}):
        with pytest.raises(ValueError, match=r"proposal is 'guided', .*use rollout_backend='hf'"):
            nf.NablaConfig(proposal="guided", **options)
    assert issubclass(GuidedSampler, Sampler)
