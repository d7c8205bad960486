"""`nabla_fast.dto.optimize` against dense autograd with torch's own Adam and the published schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from dense_dto import DensePair, DenseResult, dense_dto, partners, published_schedule
from torch import Tensor

import nabla_fast as nf
from nabla_fast.dto import DTOResult, learning_rates, optimize, optimize_batch, start_tokens
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective
from nabla_fast.sequence import Sequence, Trajectory
from nabla_fast.testing.models import (
    CLOSING,
    CONTEXT,
    FAMILIES,
    MESSAGES,
    WIDTH,
    prompt_ids,
    shared_language_model,
    shared_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
PREFIX = TOKENIZER("the ans is", add_special_tokens=False)["input_ids"]
CONFIG = nf.NablaConfig(anchor="argmax", max_iters=12, learning_rate=0.25, nll_coeff=0.4, reward_coeff=1.0)
AHEAD = 5


def start_rows(config: nf.NablaConfig, seed: int = 0, rows: int = AHEAD) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = WIDTH if config.parameterization == "latents" else len(TOKENIZER)
    spread = 1.0 if config.parameterization == "latents" else 0.5
    return spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def run_both(
    family: str,
    config: nf.NablaConfig,
    *,
    tied: bool = True,
    reward_family: str = "qwen3",
    prefix: Seq[int] = tuple(PREFIX),
    start: Tensor | None = None,
    reward_tokenizer: Any = None,
    vocab_rows: int | None = None,
) -> tuple[DTOResult, DenseResult]:
    """The package and the oracle on the same problem."""
    model = shared_language_model(family, tied=tied, vocab_rows=vocab_rows)
    reward_model = shared_reward_model(reward_family)
    start = start_rows(config) if start is None else start
    ours = optimize(model, TOKENIZER, reward_model, reward_tokenizer, list(MESSAGES), list(prefix), start, config)
    theirs = reward_tokenizer or TOKENIZER
    pair = DensePair(
        model,
        reward_model,
        len(TOKENIZER),
        prompt_ids(TOKENIZER),
        prompt_ids(theirs),
        theirs(CLOSING, add_special_tokens=False)["input_ids"],
        partners(TOKENIZER, theirs),
    )
    return ours, dense_dto(pair, prefix, start, config)


def pair_arguments(family: str = "llama", reward_family: str = "qwen3") -> tuple[Any, Any, Any, Any]:
    """The first four arguments of `optimize`."""
    model = shared_language_model(family, tied=True, vocab_rows=None)
    return model, TOKENIZER, shared_reward_model(reward_family), None


def assert_same(ours: DTOResult, dense: DenseResult, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours.parameters, dense.parameters, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.logits, dense.logits, rtol=0, atol=tolerance)
    assert ours.tokens.tolist() == dense.tokens
    assert ours.iterations == len(ours.trace) == len(dense.history)
    assert [step.changed for step in ours.trace] == changes(dense)
    assert [step.learning_rate for step in ours.trace] == pytest.approx(dense.rates, rel=1e-12)
    assert [step.reward for step in ours.trace] == pytest.approx(dense.rewards, abs=10 * tolerance)
    assert [step.log_likelihood for step in ours.trace] == pytest.approx(dense.log_likelihoods, abs=10 * tolerance)


def changes(dense: DenseResult) -> list[int]:
    """How many tokens each step changed."""
    states = [*dense.history, tuple(dense.tokens)]
    return [sum(a != b for a, b in zip(old, new, strict=True)) for old, new in itertools.pairwise(states)]


FAMILY_CASES = [
    pytest.param(family, parameterization, postfix, id=f"{family}-{parameterization}-{'all' if postfix else 'first'}")
    for family in FAMILIES
    for parameterization in ("latents", "logits")
    for postfix in (False, True)
]


def family_case(family: str, parameterization: str, postfix: bool) -> tuple[DTOResult, DenseResult]:
    index = FAMILIES.index(family)
    tied = (parameterization == "latents") ^ (index % 2 == 0)
    config = CONFIG.replace(
        parameterization=parameterization, update_postfix=postfix, tau=0.7 if tied ^ postfix else 1.0
    )
    # A seed with which the first token changes in all four cases of a family.
    start = start_rows(config, seed=5 if family == "gpt2" else 0)
    return run_both(family, config, tied=tied, reward_family=FAMILIES[(index + 3) % len(FAMILIES)], start=start)


@pytest.mark.parametrize(("family", "parameterization", "postfix"), FAMILY_CASES)
def test_every_family_equals_dense_autograd(family: str, parameterization: str, postfix: bool) -> None:
    ours, dense = family_case(family, parameterization, postfix)
    assert_same(ours, dense)
    assert sum(changes(dense)) > 0, "no token changed, so the gradient was never taken anew"


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_and_temperatures_equal_dense_autograd(parameterization: str, tau: float, tied: bool) -> None:
    ours, dense = run_both("gemma3", CONFIG.replace(parameterization=parameterization, tau=tau), tied=tied)
    assert_same(ours, dense)


@pytest.mark.parametrize("postfix", [False, True])
@pytest.mark.parametrize("parameterization", ["latents", "logits"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gumbel_noise": 0.8},
        {"gumbel_noise": 0.8, "tau": 0.7, "seed": 5},
        {"weight_decay": 0.3},
        {"warmup_iters": 4},
        {"warmup_iters": 12},
        {"lr_schedule": "linear", "warmup_iters": 3},
        {"lr_schedule": "linear", "min_lr_ratio": 0.3},
        {"lr_schedule": "constant"},
        {"min_lr_ratio": 0.0},
        {"nll_coeff": 0.0},
        {"reward_coeff": 0.0},
        {"reward_coeff": -0.7},
        {"backend": "reference", "gradient_cache": False},
    ],
    ids=lambda s: "-".join(f"{name}={value}" for name, value in s.items()),
)
def test_settings_equal_dense_autograd(settings: dict[str, Any], parameterization: str, postfix: bool) -> None:
    config = CONFIG.replace(parameterization=parameterization, update_postfix=postfix, **settings)
    ours, dense = run_both("qwen2", config)
    assert_same(ours, dense)
    assert not postfix or sum(changes(dense)) > 0


@pytest.mark.parametrize("postfix", [False, True])
@pytest.mark.parametrize(
    "rollout",
    [nf.Sampling(0.9), nf.Sampling(0.8, top_p=0.7), nf.Sampling(1.3, top_k=20), nf.Sampling(1.0, top_p=0.9, top_k=30)],
    ids=str,
)
@pytest.mark.parametrize("gumbel_noise", [0.0, 0.5])
def test_rollout_anchor_equals_dense_autograd(rollout: nf.Sampling, gumbel_noise: float, postfix: bool) -> None:
    config = CONFIG.replace(anchor="rollout", rollout=rollout, update_postfix=postfix, gumbel_noise=gumbel_noise)
    ours, dense = run_both("llama", config)
    # The noise is float32, so where it enters only the argmax, nothing but a tie could differ.
    assert_same(ours, dense)
    argmax = run_both("llama", CONFIG)[1]
    assert dense.history[0] != argmax.history[0], "the anchor made no difference"


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_rollout_anchor_of_logits_equals_dense_autograd(family: str) -> None:
    config = CONFIG.replace(anchor="rollout", parameterization="logits", update_postfix=True, tau=0.7)
    ours, dense = run_both(family, config, reward_tokenizer=tiny_tokenizer(shuffle=3))
    assert_same(ours, dense)
    assert sum(changes(dense)) > 0


def test_rollout_anchor_at_temperature_0_starts_at_the_argmax() -> None:
    config = CONFIG.replace(anchor="rollout", rollout=nf.Sampling(temperature=0.0), max_iters=0)
    ours, _ = run_both("llama", config.replace(anchor="argmax"))
    anchored = optimize(*pair_arguments("llama"), list(MESSAGES), PREFIX, start_rows(config), config)
    assert torch.equal(anchored.tokens, ours.tokens)


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
def test_without_a_prefix_equals_dense_autograd(parameterization: str) -> None:
    for rows in (1, 3):
        config = CONFIG.replace(parameterization=parameterization, update_postfix=True)
        assert_same(*run_both("qwen3", config, prefix=(), start=start_rows(config, rows=rows)))


@pytest.mark.parametrize("postfix", [False, True])
def test_padded_vocabulary_equals_dense_autograd_over_the_tokenizers_tokens(postfix: bool) -> None:
    ours, dense = run_both("llama", CONFIG.replace(update_postfix=postfix), vocab_rows=96)
    assert_same(ours, dense)
    assert ours.logits.shape[1] == len(TOKENIZER)


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
def test_reward_tokenizer_in_another_order_equals_dense_autograd(parameterization: str) -> None:
    config = CONFIG.replace(parameterization=parameterization, update_postfix=True)
    assert_same(*run_both("qwen2", config, reward_tokenizer=tiny_tokenizer(shuffle=3)))


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_reward_tokenizer_without_some_tokens_equals_dense_autograd() -> None:
    config = CONFIG.replace(update_postfix=True)
    other = tiny_tokenizer(shuffle=4, missing=("ans", "what", "24"))
    ours, dense = run_both("qwen2", config, reward_tokenizer=other)
    assert_same(ours, dense)


def test_response_that_ends_its_turn_equals_dense_autograd() -> None:
    """The last row starts at the end-of-turn token and stays there: the template's own is then not written again."""
    config = CONFIG.replace(parameterization="logits")
    start = start_rows(config)
    start[-1, TOKENIZER.eos_token_id] = 30.0
    ours, dense = run_both("llama", config, start=start)
    assert dense.tokens[-1] == TOKENIZER.eos_token_id
    assert_same(ours, dense)


@pytest.mark.parametrize("reward_coeff", [-1.0, 1.0])
def test_last_token_that_stops_being_the_end_of_turn_equals_dense_autograd(reward_coeff: float) -> None:
    config = CONFIG.replace(parameterization="logits", learning_rate=0.3, reward_coeff=reward_coeff)
    start = start_rows(config, rows=1)
    start[0, TOKENIZER.eos_token_id] = start.max() + 0.05
    ours, dense = run_both("gpt2", config, start=start)
    assert_same(ours, dense)
    ends = [tokens[-1] == TOKENIZER.eos_token_id for tokens in dense.history]
    assert ends[0]
    assert not ends[-1]


# What optimize() counts and leaves alone


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("postfix", [False, True])
def test_gradient_is_taken_once_per_change_and_with_the_cache_once_per_response(cache: bool, postfix: bool) -> None:
    # This case comes back to tokens that it has been at.
    config = CONFIG.replace(
        update_postfix=postfix, gradient_cache=cache, lr_schedule="constant", learning_rate=0.6, max_iters=20
    )
    ours, dense = run_both("qwen2", config, start=start_rows(config, seed=2))
    changed = [count > 0 for count in changes(dense)]
    assert [step.evaluated for step in ours.trace] == [True, *changed[:-1]]
    anew, distinct = 1 + sum(changed[:-1]), len(set(dense.history))
    assert distinct < anew, "no response came back, so the cache proved nothing"
    assert ours.gradient_evaluations == (distinct if cache else anew)


def test_gradient_is_taken_once_while_no_token_changes() -> None:
    ours, dense = run_both("llama", CONFIG.replace(learning_rate=1e-5, gradient_cache=False))
    assert_same(ours, dense)
    assert sum(changes(dense)) == 0
    assert ours.gradient_evaluations == 1
    assert not torch.equal(ours.parameters, start_rows(CONFIG))


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
def test_only_the_first_row_moves_without_postfix(parameterization: str) -> None:
    config = CONFIG.replace(parameterization=parameterization)
    start = start_rows(config)
    kept = start.clone()
    result = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start, config)
    assert torch.equal(start, kept), "the caller's start was changed"
    assert torch.equal(result.parameters[1:], start[1:])
    assert not torch.equal(result.parameters[0], start[0])
    assert result.logits.shape == (1, len(TOKENIZER))
    assert result.tokens.shape == (AHEAD,)
    everything = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start, config.replace(update_postfix=True))
    assert torch.equal(start, kept), "the caller's start was changed"
    assert bool((everything.parameters != start).any(1).all())
    assert everything.logits.shape == (AHEAD, len(TOKENIZER))


@pytest.mark.parametrize("postfix", [False, True])
@pytest.mark.parametrize("anchor", ["argmax", "rollout"])
def test_no_iterations_change_nothing_and_call_no_model(anchor: str, postfix: bool) -> None:
    config = CONFIG.replace(max_iters=0, anchor=anchor, update_postfix=postfix)
    ours, dense = run_both("llama", config)
    assert torch.equal(ours.parameters, start_rows(config))
    assert ours.tokens.tolist() == dense.tokens
    assert (ours.iterations, ours.gradient_evaluations, ours.trace) == (0, 0, ())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("iterations", "warmup"), [(1, 0), (1, 1), (20, 0), (20, 1), (20, 5), (20, 19), (20, 20), (0, 0)]
)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_learning_rates_are_those_of_the_published_schedules(
    schedule: str, iterations: int, warmup: int, ratio: float
) -> None:
    config = nf.NablaConfig(
        max_iters=iterations, warmup_iters=warmup, lr_schedule=schedule, min_lr_ratio=ratio, learning_rate=0.03
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    scheduler = published_schedule(optimizer, config)
    expected = []
    for _ in range(iterations):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert learning_rates(config) == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_decay_is_cut_off_at_its_floor_and_warm_up_starts_at_nothing() -> None:
    config = nf.NablaConfig(max_iters=8, warmup_iters=4, learning_rate=1.0, min_lr_ratio=0.4)
    half_way = (1 + 0.5**0.5) / 2
    assert learning_rates(config) == pytest.approx([0, 0.25, 0.5, 0.75, 1, half_way, 0.5, 0.4], rel=1e-12)
    linear = learning_rates(config.replace(lr_schedule="linear"))
    assert linear == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.4], rel=1e-12)


@pytest.mark.parametrize("postfix", [False, True])
def test_near_certain_token_does_not_move(postfix: bool) -> None:
    """A known limit of the method: the gradient is proportional to the probabilities of the other tokens."""
    config = CONFIG.replace(parameterization="logits", update_postfix=postfix)
    start = start_rows(config)
    certain = TOKENIZER.convert_tokens_to_ids("12")
    start[0, certain] = 60.0
    result = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start, config)
    assert result.tokens[0] == certain
    torch.testing.assert_close(result.parameters[0], start[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_start_keeps_its_precision_and_half_precision_is_widened(dtype: torch.dtype, expected: torch.dtype) -> None:
    start = start_rows(CONFIG).to(dtype)
    result = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start, CONFIG)
    assert result.parameters.dtype == expected
    tight = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start.double(), CONFIG)
    assert torch.equal(result.tokens, tight.tokens)
    torch.testing.assert_close(result.parameters.double(), tight.parameters, rtol=0, atol=1e-3)


def test_works_inside_inference_mode_and_without_gradients_enabled() -> None:
    config = CONFIG.replace(update_postfix=True)
    expected = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start_rows(config), config)
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context:
            result = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start_rows(config), config)
        assert torch.equal(result.parameters, expected.parameters)
        assert not result.parameters.requires_grad


def test_prefix_ids_may_be_a_tensor_and_none_is_the_default_config() -> None:
    results = [
        optimize(*pair_arguments(), list(MESSAGES), prefix, start_rows(nf.NablaConfig()))
        for prefix in (PREFIX, torch.tensor(PREFIX), tuple(PREFIX))
    ]
    explicit = optimize(*pair_arguments(), list(MESSAGES), PREFIX, start_rows(CONFIG), nf.NablaConfig())
    assert all(torch.equal(result.parameters, explicit.parameters) for result in results)


# Several sequences at once

QUESTIONS = ("what is 3 times 4", "at it", "what is 12 + 24 + 36 + 48?")


Batch = tuple[Objective, list[Sequence], list[torch.Tensor]]


def batch(config: nf.NablaConfig) -> Batch:
    """Three sequences with prompts, committed tokens and rows ahead of different lengths; the rows to start from."""
    model, tokenizer, reward_model, _ = pair_arguments()
    language_model = LanguageModel(model, tokenizer)
    rewards = RewardModel(reward_model, None, language_model, tokenizer)
    sequences, starts = [], []
    for i, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        sequence = Sequence(tuple(prompt_ids(tokenizer, chat)), (), 7 + i, 20, rewards.chat_frame(chat))
        start = start_rows(config, seed=i, rows=2 + 2 * i)
        latents = config.parameterization == "latents"
        ahead = start_tokens(start, latents, sequence.seed, i, language_model.head, config)
        place(sequence, torch.tensor(PREFIX[:i], dtype=torch.long), ahead)
        sequences.append(sequence)
        starts.append(start)
    return Objective(language_model, rewards, config), sequences, starts


def place(sequence: Sequence, committed: torch.Tensor, ahead: torch.Tensor) -> None:
    """Puts a sequence behind ``committed`` (n,), with ``ahead`` (m,) as its tokens, sampled and hard."""
    tokens = torch.cat([committed, ahead])
    sequence.position = len(committed)
    sequence.trajectory = Trajectory(tokens, torch.empty(len(tokens), 0), tokens, torch.ones(len(tokens)), math.nan)


@pytest.mark.parametrize("postfix", [False, True])
@pytest.mark.parametrize("parameterization", ["latents", "logits"])
@pytest.mark.parametrize("settings", [{}, {"gumbel_noise": 0.5}, {"anchor": "rollout"}], ids=str)
def test_sequences_in_a_batch_equal_each_alone(parameterization: str, postfix: bool, settings: dict[str, Any]) -> None:
    config = CONFIG.replace(parameterization=parameterization, update_postfix=postfix, **settings)
    objective, sequences, starts = batch(config)
    together = optimize_batch(sequences, starts, objective)
    for i, result in enumerate(together):
        objective, sequences, starts = batch(config)
        (alone,) = optimize_batch([sequences[i]], [starts[i]], objective)
        torch.testing.assert_close(result.parameters, alone.parameters, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.logits, alone.logits, rtol=0, atol=1e-9)
        assert torch.equal(result.tokens, alone.tokens)
        assert result.gradient_evaluations == alone.gradient_evaluations
        assert [step[:3] for step in result.trace] == [step[:3] for step in alone.trace]
    assert len({step.changed for result in together for step in result.trace}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("postfix", [False, True])
def test_rollout_anchor_starts_at_the_tokens_that_were_drawn_whatever_they_are(
    dtype: torch.dtype, postfix: bool
) -> None:
    config = CONFIG.replace(anchor="rollout", learning_rate=0.0, max_iters=2, update_postfix=postfix)
    for seed in range(10):
        objective, sequences, starts = batch(config)
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(len(TOKENIZER), (len(start),), generator=generator) for start in starts]
        for sequence, ahead in zip(sequences, drawn, strict=True):
            place(sequence, sequence.current.tokens[: sequence.position], ahead)
        results = optimize_batch(sequences, [start.to(dtype) for start in starts], objective)
        for ahead, result in zip(drawn, results, strict=True):
            assert torch.equal(result.tokens, ahead)
            assert result.gradient_evaluations == 1


def test_trace_counts_the_tokens_ahead_alone_where_the_gradient_was_found_in_the_cache() -> None:
    """As when the decoder moves on to the next position: the entry covers the position before it too."""
    config = CONFIG.replace(learning_rate=0.0, max_iters=1)
    results = {}
    for cache in (True, False):
        objective, (_, sequence, _), (_, start, _) = batch(config.replace(gradient_cache=cache))
        optimize_batch([sequence], [start], objective)
        sequence.position += 1
        (results[cache],) = optimize_batch([sequence], [start[1:]], objective)
    assert (results[True].gradient_evaluations, results[False].gradient_evaluations) == (0, 1)
    found, fresh = results[True].trace[0], results[False].trace[0]
    assert found.evaluated
    assert found.reward == pytest.approx(fresh.reward, abs=1e-9)
    assert found.log_likelihood == pytest.approx(fresh.log_likelihood, abs=1e-9)


# Bad input


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
@pytest.mark.parametrize("bad", ["vector", "cube", "empty", "narrow", "wide", "integers", "list"])
def test_start_of_another_shape_or_type_is_refused(bad: str, parameterization: str) -> None:
    config = CONFIG.replace(parameterization=parameterization)
    start = start_rows(config)
    wrong: dict[str, Any] = {
        "vector": start[0],
        "cube": start.unsqueeze(0),
        "empty": start[:0],
        "narrow": start[:, :-1],
        "wide": torch.cat([start, start], 1),
        "integers": start.long(),
        "list": start.tolist(),
    }
    with pytest.raises((ValueError, TypeError), match=r"^start must be a float tensor"):
        optimize(*pair_arguments(), list(MESSAGES), PREFIX, wrong[bad], config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_start_that_is_not_finite_is_refused(value: float) -> None:
    start = start_rows(CONFIG)
    start[-1, -1] = value
    with pytest.raises(FloatingPointError, match=r"^start holds"):
        optimize(*pair_arguments(), list(MESSAGES), PREFIX, start, CONFIG)


@pytest.mark.parametrize("prefix", [[-1], [len(TOKENIZER)], [0, 10**9], [0.5, 1.5], [[1, 2], [3, 4]]], ids=str)
def test_prefix_that_is_no_list_of_known_token_ids_is_refused(prefix: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^prefix_ids must"):
        optimize(*pair_arguments(), list(MESSAGES), prefix, start_rows(CONFIG), CONFIG)


def test_ids_of_padding_rows_are_refused_as_prefix() -> None:
    model = shared_language_model("llama", tied=True, vocab_rows=96)
    with pytest.raises(ValueError, match="prefix_ids must hold token ids from 0 to 84"):
        optimize(model, TOKENIZER, shared_reward_model("qwen3"), None, list(MESSAGES), [90], start_rows(CONFIG), CONFIG)


@pytest.mark.parametrize("messages", ["what is 3", [], ["what is 3"]], ids=str)
def test_messages_that_are_no_chat_are_refused(messages: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="messages"):
        optimize(*pair_arguments(), messages, PREFIX, start_rows(CONFIG), CONFIG)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_response_longer_than_the_language_models_context_is_refused(family: str) -> None:
    model, tokenizer, *_ = pair_arguments(family)

    def reward(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return (inputs_embeds.sum(-1) * attention_mask).sum(1)

    with pytest.raises(ValueError, match=f"{CONTEXT}"):
        optimize(model, tokenizer, reward, None, list(MESSAGES), PREFIX * 30, start_rows(CONFIG), CONFIG)


def test_tokenizer_without_a_chat_template_is_refused_by_name() -> None:
    model, tokenizer, reward_model, _ = pair_arguments()
    bare = tiny_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"^reward_tokenizer .* has no chat template"):
        optimize(model, tokenizer, reward_model, bare, list(MESSAGES), PREFIX, start_rows(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"^tokenizer .* has no chat template"):
        optimize(model, bare, reward_model, tokenizer, list(MESSAGES), PREFIX, start_rows(CONFIG), CONFIG)


def test_back_end_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^backend .*'cuda'"):
        optimize(*pair_arguments(), list(MESSAGES), PREFIX, start_rows(CONFIG), CONFIG.replace(backend="cuda"))
