"""Forward and backward behind a prefix against whole sequences, on every family."""

from __future__ import annotations

import gc
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nabla_fast as nf
from nabla_fast.gradient_cache import Evaluation
from nabla_fast.models import sequence_cache
from nabla_fast.models.backbone import Backbone, Inputs, cache_argument
from nabla_fast.models.decoder_layers import checkpointed
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.sequence_cache import SequenceCache, common_lengths
from nabla_fast.models.temporary import frozen
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    FAMILIES,
    shared_language_model,
    shared_reward_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
CONFIG = nf.NablaConfig(nll_coeff=0.4, reward_coeff=-1.3, gradient_cache=False)
# Padding is as long as the longest prompt is longer than the shortest.
PROMPTS = ([5, 9, 11], [7, 3, 2, 6, 40, 41, 42, 20, 31, 8, 12, 14, 50, 61], [4])


def objective(family: str, **changes: Any) -> Objective:
    language_model = LanguageModel(shared_language_model(family), TOKENIZER)
    reward = shared_reward_model(FAMILIES[(FAMILIES.index(family) + 3) % len(FAMILIES)])
    rewards = RewardModel(reward, None, language_model, TOKENIZER)
    return Objective(language_model, rewards, CONFIG.replace(**changes))


def whole(family: str) -> Objective:
    """One that takes whole sequences for every gradient."""
    ours = objective(family)
    for backbone in (ours.language_model.backbone, ours.reward_model.backbone):
        assert backbone is not None
        assert backbone.supports_prefix_cache
        backbone.supports_prefix_cache = False
    return ours


def sequence(ours: Objective, prompt: list[int]) -> Sequence:
    return Sequence(tuple(prompt), (), 0, 64, ours.reward_model.prompt_frame(prompt))


def response(length: int, seed: int) -> Tensor:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed))


def same(ours: Evaluation, expected: Evaluation, tolerance: float = 1e-10) -> None:
    assert ours.start == expected.start
    for mine, theirs in zip(ours.factors, expected.factors, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.log_likelihoods, expected.log_likelihoods, rtol=0, atol=tolerance)
    assert ours.reward == pytest.approx(expected.reward, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_gradients_equal_whole_sequences_at_every_split_point(family: str) -> None:
    """In a ragged batch: prompts, splits and responses of three lengths."""
    cached, full = objective(family), whole(family)
    y = response(12, seed=3)
    for start in range(len(y)):
        requests = {}
        for ours in (cached, full):
            cases = zip(PROMPTS, (y, y[: start + 1], y[: start + 2]), (start, start, start // 2), strict=True)
            requests[ours] = [Request(sequence(ours, prompt), tokens, at) for prompt, tokens, at in cases]
        for mine, theirs in zip(cached.evaluate(requests[cached]), full.evaluate(requests[full]), strict=True):
            same(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_in_float32_agree_to_rounding(family: str) -> None:
    language = tiny_language_model(family, dtype=torch.float32)
    reward = tiny_reward_model(FAMILIES[(FAMILIES.index(family) + 3) % len(FAMILIES)], dtype=torch.float32)
    results = []
    for supported in (True, False):
        language_model = LanguageModel(language, TOKENIZER)
        ours = Objective(language_model, RewardModel(reward, None, language_model, TOKENIZER), CONFIG)
        for backbone in (ours.language_model.backbone, ours.reward_model.backbone):
            assert backbone is not None
            backbone.supports_prefix_cache = supported
        y = response(12, seed=3)
        requests = [Request(sequence(ours, p), y[: 12 - i], 2 * i) for i, p in enumerate(PROMPTS)]
        results.append(ours.evaluate(requests))
    for mine, theirs in zip(*results, strict=True):
        for one, other in zip(mine.factors, theirs.factors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
        torch.testing.assert_close(mine.log_likelihoods, theirs.log_likelihoods, rtol=1e-5, atol=1e-4)
        assert mine.reward == pytest.approx(theirs.reward, rel=1e-4, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(
        st.lists(st.tuples(st.integers(1, 10), st.integers(0, 9), st.integers(0, 3)), min_size=3, max_size=3),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from([0, 2, 8]),
)
def test_what_a_sequence_keeps_never_changes_a_gradient(
    family: str, rounds: list[list[tuple[int, int, int]]], together: int
) -> None:
    """Whatever was asked before: longer, shorter, other tokens from some position on, earlier and later starts.

    So many tokens ``together`` with the next pass, where the prefix lacks them.
    """
    ours, full = objective(family), whole(family)
    kept = [sequence(ours, prompt) for prompt in PROMPTS]
    for asked in rounds:
        # Responses with few seeds, so that the first tokens are often the same and sometimes not.
        cases = [(response(n, seed % 2), min(start, n - 1)) for n, start, seed in asked]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sequence_cache.TOKENS_PER_PASS, "cpu", together)
            mine = ours.evaluate([Request(c, y, start) for c, (y, start) in zip(kept, cases, strict=True)])
        fresh = [Request(sequence(full, p), y, start) for p, (y, start) in zip(PROMPTS, cases, strict=True)]
        for one, other in zip(mine, full.evaluate(fresh), strict=True):
            same(one, other)
        scored = [response(n, seed) for n, _, seed in asked]
        expected = full.rewards([request.sequence for request in fresh], scored)
        assert ours.rewards(kept, scored) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_attention_in_float32(family: str) -> None:
    """As users have it: sdpa where the family has it, eager else, left-padded."""
    language = tiny_language_model(family, dtype=torch.float32)
    language.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    backbone = Backbone(language, "model")
    assert backbone.supports_prefix_cache
    table = language.get_input_embeddings()
    tokens = [torch.tensor(prompt) for prompt in PROMPTS]
    tails = [response(n, seed=n) for n in (4, 9, 2)]
    with torch.no_grad():
        _, states = backbone([None] * 3, [Inputs(t, table(t)) for t in tokens])
    inputs = [Inputs(t, table(t)).differentiable() for t in tails]
    hidden, _ = backbone(states, inputs)
    grads = torch.autograd.grad(sum(h.square().sum() for h in hidden), [x.embeds for x in inputs])
    for prompt, tail, mine, grad in zip(tokens, tails, hidden, grads, strict=True):
        alone = table(tail).detach().requires_grad_()
        full = language.base_model(inputs_embeds=torch.cat([table(prompt), alone]).unsqueeze(0), use_cache=False)
        expected = full.last_hidden_state[0, len(prompt) :]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), alone)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5 * float(expected_grad.abs().max()))


def test_a_prefix_is_run_once_and_extended_by_what_is_new() -> None:
    ours = objective("llama")
    lengths: list[list[int]] = []
    backbone = ours.language_model.backbone
    run = Backbone._extend_batch

    def counted(self: Backbone, states: Any, embeds: Any) -> Any:
        if self is backbone:
            lengths.append([len(x) for x in embeds])
        return run(self, states, embeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "_extend_batch", counted)
        one = sequence(ours, PROMPTS[1])
        y = response(10, seed=1)
        ours.evaluate([Request(one, y, 2)])
        assert lengths == [
            [len(PROMPTS[1]) + 2],
            [7],
        ]  # prompt and two committed; of eight ahead, the last predicts none
        lengths.clear()
        ours.evaluate([Request(one, y, 5)])  # three more were committed as they were
        assert lengths == [[4]]
        lengths.clear()
        other = y.clone()
        other[5] = (other[5] + 1) % V
        ours.evaluate([Request(one, other, 5)])
        assert lengths == [[4]]
        lengths.clear()
        ours.evaluate([Request(one, other, 7)])
        assert lengths == [[2]]
        lengths.clear()
        ours.evaluate([Request(one, y, 7)])  # back to the old token: from position 5 on
        assert lengths == [[4]]  # the two that the prefix lacks, and two ahead
        lengths.clear()
        ours.evaluate([Request(one, y, 9)])  # the last token alone: the state that predicts it is there
        assert lengths == []
        other = y.clone()
        other[8] = (other[8] + 1) % V
        ours.evaluate([Request(one, other, 9)])  # and here it is not
        assert lengths == [[1]]
        lengths.clear()
        patch.setitem(sequence_cache.TOKENS_PER_PASS, "cpu", 1)
        other = y.clone()
        other[5] = (other[5] + 1) % V
        ours.evaluate([Request(one, other, 7)])  # more than may join it
        assert lengths == [[2], [2]]


def test_a_row_keeps_no_memory_of_its_batch() -> None:
    ours = objective("llama")
    sequences = [sequence(ours, prompt) for prompt in PROMPTS]
    ours.evaluate([Request(s, response(6, seed=2), 1) for s in sequences])
    for one in sequences:
        for kept in (one.language_cache, one.reward_cache):
            assert kept is not None
            assert kept.cache is not None
            assert not any(x.requires_grad for x in (*kept.cache.keys, *kept.cache.values, kept.cache.hidden))
            for x in (*kept.cache.keys, *kept.cache.values):
                assert x.untyped_storage().nbytes() <= 3 * x.nbytes


def test_nothing_outlives_its_sequence() -> None:
    ours = objective("llama")
    one = sequence(ours, PROMPTS[0])
    ours.evaluate([Request(one, response(6, seed=2), 1)])
    assert one.language_cache is not None
    assert one.language_cache.cache is not None
    state = weakref.ref(one.language_cache.cache.keys[0])
    del one
    gc.collect()
    assert state() is None


def test_common_lengths_and_crops() -> None:
    caches = []
    for tokens in ([1, 2, 3, 4], [1, 2], [], [9]):
        cache = SequenceCache(Inputs(torch.zeros(3, dtype=torch.long), torch.zeros(3, 2)))
        size = 3 + len(tokens)
        cache.keep(torch.tensor(tokens, dtype=torch.long), KVCache((), (), torch.arange(size * 2.0).view(size, 2)))
        caches.append(cache)
    responses = [torch.tensor(r, dtype=torch.long) for r in ([1, 2, 7, 4], [1, 2, 3], [5], [])]
    assert common_lengths(caches, responses) == [2, 2, 0, 0]
    caches[0].keep(caches[0].tokens[:1], caches[0].before(1))
    assert caches[0].tokens.tolist() == [1]
    assert caches[0].cache is not None
    assert len(caches[0].cache) == 4


# Models for which it is not exact


def test_length_dependent_rotary_embeddings_take_whole_sequences_with_one_warning() -> None:
    language = tiny_language_model("phi3")
    half = language.config.hidden_size // language.config.num_attention_heads // 2
    language.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
    }
    with pytest.warns(UserWarning, match=r"model \(Phi3.*takes whole sequences .*longrope.* depend on the length"):
        ours = LanguageModel(language, TOKENIZER)
    assert not ours.backbone.supports_prefix_cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not LanguageModel(language, TOKENIZER).backbone.supports_prefix_cache


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "dynamic"}}}, r"dynamic"),
    ],
)
def test_other_kinds_are_known_by_their_configuration(setting: dict[str, Any], reason: str) -> None:
    language = tiny_language_model("llama")
    for name, value in setting.items():
        object.__setattr__(language.config, name, value)
    with pytest.warns(UserWarning, match=reason):
        assert Backbone(language, "model").cache_kind != "prefix"


class _Looking(nn.Module):
    """Hidden states that depend on how many tokens a call brings; nothing in the configuration says so."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 8)
        self.breaks = breaks
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    @property
    def base_model(self) -> _Looking:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Any = None, past_key_values: Any = None, **_: Any
    ) -> Any:
        inputs_embeds = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        if self.breaks and past_key_values is not None:
            raise ValueError("no cache here")
        if past_key_values is not None:
            past_key_values.update(inputs_embeds.unsqueeze(1), inputs_embeds.unsqueeze(1), 0)
        return SimpleNamespace(last_hidden_state=inputs_embeds + inputs_embeds.sum(1, keepdim=True))


def test_the_cache_is_passed_under_the_name_that_the_model_has_for_it() -> None:
    renamed = SimpleNamespace(forward=lambda inputs_embeds, cache=None, **kwargs: None)
    assert cache_argument(renamed) == "cache"
    assert cache_argument(_Looking(breaks=False)) == "past_key_values"


@pytest.mark.parametrize(("breaks", "reason"), [(False, "apart from whole sequences"), (True, "no cache here")])
def test_unknown_kinds_are_found_by_trying(breaks: bool, reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        backbone = Backbone(_Looking(breaks), "model")
    assert not backbone.supports_prefix_cache
    x = torch.randn(4, 8)
    (hidden,), states = backbone([None], [Inputs(torch.arange(4), x)])
    torch.testing.assert_close(hidden, x + x.sum(0))
    assert states == [None]


# Activations


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_gradients_are_the_same_and_every_layer_runs_twice(family: str) -> None:
    plain, again = objective(family), objective(family, checkpoint_activations=True)
    calls = [0]
    model = again.language_model.model
    handle = model.base_model.register_forward_hook(lambda *_: None)
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block", "Layer")))
    attention = next(m for name, m in layer.named_modules() if "att" in name)
    handles = [handle, attention.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))]
    try:
        for ours, runs in ((plain, 2), (again, 3)):  # the prefix, and the suffix once or twice
            calls[0] = 0
            evaluations = ours.evaluate([Request(sequence(ours, p), response(8, seed=4), 2) for p in PROMPTS])
            assert calls[0] == runs
            if ours is plain:
                expected = evaluations
    finally:
        for handle in handles:
            handle.remove()
    for mine, theirs in zip(evaluations, expected, strict=True):
        same(mine, theirs, 1e-12)
    assert "forward" not in vars(layer)


def test_checkpointing_needs_layers_that_transformers_knows() -> None:
    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)
    rewards = RewardModel(shared_reward_model("llama"), None, language_model, TOKENIZER)
    language_model.backbone.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^checkpoint_activations must be False for model \(Llama"):
        Objective(language_model, rewards, CONFIG.replace(checkpoint_activations=True))


def test_frozen_and_checkpointed_leave_a_model_as_it_was() -> None:
    model = tiny_language_model("llama")
    next(model.parameters()).requires_grad_(False)
    model.model.layers[1].forward = model.model.layers[1].forward

    def look() -> tuple[list[bool], list[Any]]:
        return [p.requires_grad for p in model.parameters()], [vars(m).get("forward") for m in model.modules()]

    def interrupted() -> None:
        with frozen(model.parameters()), checkpointed(model):
            assert not any(look()[0])
            assert look()[1] != before[1]
            raise KeyboardInterrupt

    before = look()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert look() == before
