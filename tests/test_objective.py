"""The objective and its factors against whole-sequence autograd through transformers' own heads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nabla_fast as nf
from nabla_fast import ops
from nabla_fast.gradient_cache import Evaluation
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    CLOSING,
    FAMILIES,
    prompt_ids,
    shared_language_model,
    shared_reward_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
REWARD_TOKENIZER = tiny_tokenizer(shuffle=6)
V = len(TOKENIZER)
CONFIG = nf.NablaConfig(nll_coeff=0.4, reward_coeff=-1.3)
# (question, response, first position whose gradient is asked for)
CASES = [
    ("what is 3 times 4", "the ans is 12", 0),
    ("at it", "12", 0),
    ("what is 12 + 24 + 36 + 48?", "it is 10 or 12 or 24.", 4),
    ("is it", "the ans is 36", 6),
]


@dataclass
class Setting:
    language: Any
    reward: Any
    objective: Objective

    def request(self, question: str, response: str, start: int) -> Request:
        chat = [{"role": "user", "content": question}]
        frame = self.objective.reward_model.chat_frame(chat)
        ids = torch.tensor(TOKENIZER(response, add_special_tokens=False)["input_ids"])
        assert start < len(ids)
        return Request(Sequence(tuple(prompt_ids(TOKENIZER, chat)), (), 0, 64, frame), ids, start)

    def requests(self) -> list[Request]:
        return [self.request(*case) for case in CASES]


def setting(
    family: str = "llama", reward_family: str = "qwen3", *, tied: bool = True, rows: int | None = None, **changes: Any
) -> Setting:
    language = shared_language_model(family, tied=tied, vocab_rows=rows)
    reward = shared_reward_model(reward_family)
    language_model = LanguageModel(language, TOKENIZER)
    reward_model = RewardModel(reward, REWARD_TOKENIZER, language_model, TOKENIZER)
    return Setting(language, reward, Objective(language_model, reward_model, CONFIG.replace(**changes)))


def likelihood_by_autograd(model: Any, request: Request) -> tuple[Tensor, Tensor, float]:
    """Dense dL/d(one-hot) of the likelihood's part alone (m, V), its embedding gradient (m, d), and sum log pi."""
    prompt, response, start = request.sequence.prompt_ids, request.response.tolist(), request.start
    table = model.get_input_embeddings()(torch.arange(V))
    before = len(prompt) + start
    ahead = torch.eye(V, dtype=torch.float64)[response[start:]].requires_grad_()
    embedded = (ahead @ table).detach().requires_grad_()
    known = table[torch.tensor([*prompt, *response[:start]])]

    def value(embeds: Tensor) -> Tensor:
        logits = model(inputs_embeds=torch.cat([known, embeds]).unsqueeze(0), use_cache=False).logits[0]
        return (ahead * logits[before - 1 : -1, :V].log_softmax(-1)).sum()

    log_pi = value(ahead @ table)
    (dense,) = torch.autograd.grad(-CONFIG.nll_coeff * log_pi, ahead)
    (gradient,) = torch.autograd.grad(-CONFIG.nll_coeff * value(embedded), embedded)
    return dense, gradient, float(log_pi.detach())


def reward_by_autograd(model: Any, request: Request, question: str) -> tuple[Tensor, Tensor, float]:
    """The same of the reward's part, and the reward."""
    chat = [{"role": "user", "content": question}]
    embed = model.get_input_embeddings()
    order = torch.tensor([REWARD_TOKENIZER.get_vocab()[t] for t in TOKENIZER.convert_ids_to_tokens(list(range(V)))])
    table = embed(order)
    opening = torch.cat(
        [embed(torch.tensor(prompt_ids(REWARD_TOKENIZER, chat))), table[request.response[: request.start]]]
    )
    closing = embed(torch.tensor(REWARD_TOKENIZER(CLOSING)["input_ids"]))
    ahead = torch.eye(V, dtype=torch.float64)[request.response[request.start :]].requires_grad_()
    embedded = ahead @ table
    conversation = torch.cat([opening, embedded, closing]).unsqueeze(0)
    reward = model(inputs_embeds=conversation, use_cache=False).logits[0, 0]
    dense, gradient = torch.autograd.grad(-CONFIG.reward_coeff * reward, (ahead, embedded))
    return dense, gradient, float(reward.detach())


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def same(ours: Evaluation, expected: Evaluation) -> None:
    assert ours.start == expected.start
    for mine, theirs in zip(ours.factors, expected.factors, strict=True):
        close(mine, theirs)
    assert ours.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
    assert ours.reward == pytest.approx(expected.reward, abs=1e-10)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_factors_of_models_in_half_precision(dtype: torch.dtype, kept: torch.dtype) -> None:
    """What float16 can hold ends at 6e-8, so coefficients that small must not be lost there.

    Rounding of bfloat16 comes to 0.04 on average, and to several times that with some weights.
    """
    tiny = 1e-8
    exact = setting()
    language_model = LanguageModel(tiny_language_model("llama", dtype=dtype), TOKENIZER)
    reward_model = RewardModel(tiny_reward_model("qwen3", dtype=dtype), REWARD_TOKENIZER, language_model, TOKENIZER)
    for scale in (1.0, tiny):
        config = CONFIG.replace(nll_coeff=CONFIG.nll_coeff * scale, reward_coeff=CONFIG.reward_coeff * scale)
        rounded = Setting(None, None, Objective(language_model, reward_model, config))
        for ours, meant in zip(
            rounded.objective.evaluate(rounded.requests()), exact.objective.evaluate(exact.requests()), strict=True
        ):
            assert ours.factors.hidden.dtype == dtype
            for mine, theirs in zip(ours.factors[1:], meant.factors[1:], strict=True):
                assert mine.dtype == kept
                error = (mine.double() / scale - theirs).norm() / theirs.norm().clamp(min=1e-9)
                assert error < 0.15


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_a_ragged_batch_equal_whole_sequence_autograd(family: str, tied: bool) -> None:
    reward_family = FAMILIES[(FAMILIES.index(family) + 5) % len(FAMILIES)]
    case = setting(family, reward_family, tied=tied, rows=96)
    requests = case.requests()
    scale = case.objective.language_model.embedding.scale
    reward_scale = case.objective.reward_model.table.scale
    for request, ours, (question, _, _) in zip(requests, case.objective.evaluate(requests), CASES, strict=True):
        dense, gradient, log_pi = likelihood_by_autograd(case.language, request)
        reward_dense, reward_gradient, reward = reward_by_autograd(case.reward, request, question)
        assert ours.start == request.start
        assert ours.log_likelihood == pytest.approx(log_pi, abs=1e-10)
        assert ours.reward == pytest.approx(reward, abs=1e-10)
        close(ours.factors.embedding, gradient * scale)
        close(ours.factors.reward_embedding, reward_gradient * reward_scale)
        meant = dense + reward_dense
        difference = ops.token_gradient(ours.factors, case.objective.tables) - meant
        close(difference, difference[:, :1].expand_as(difference), 1e-9)
        close(ops.gradient_norm(ours.factors, case.objective.tables), meant.norm(dim=-1), 1e-9)
        assert float(reward_gradient.abs().max()) > 1e-3
        assert len(gradient) == 1 or float(gradient[:-1].abs().max()) > 1e-3


def test_hidden_factor_is_the_state_that_predicts_each_position() -> None:
    case = setting("llama")
    for request, ours in zip(case.requests(), case.objective.evaluate(case.requests()), strict=True):
        ids = torch.tensor([[*request.sequence.prompt_ids, *request.response.tolist()]])
        hidden = case.language.base_model(input_ids=ids).last_hidden_state[0]
        first = len(request.sequence.prompt_ids) + request.start
        close(ours.factors.hidden, hidden[first - 1 : -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_ragged_responses_equals_each_alone(family: str) -> None:
    case = setting(family, family, gradient_cache=False)
    together = case.objective.evaluate(case.requests())
    for ours, request in zip(together, case.requests(), strict=True):
        same(ours, case.objective.evaluate([request])[0])
    backwards = case.objective.evaluate(case.requests()[::-1])[::-1]
    for ours, expected in zip(backwards, together, strict=True):
        same(ours, expected)


@pytest.mark.parametrize("evaluated_first", [False, True])
def test_rewards_equal_those_of_an_evaluation_and_are_counted(evaluated_first: bool) -> None:
    case = setting(gradient_cache=False)
    requests = case.requests()
    sequences, responses = [r.sequence for r in requests], [r.response for r in requests]
    if evaluated_first:
        evaluated = [e.reward for e in case.objective.evaluate(requests)]
        rewards = case.objective.rewards(sequences, responses)
    else:
        rewards = case.objective.rewards(sequences, responses)
        evaluated = [e.reward for e in case.objective.evaluate(requests)]
    assert rewards == pytest.approx(evaluated, abs=1e-10)
    assert len(set(rewards)) == len(rewards)
    assert [s.stats.reward_calls for s in sequences] == [1] * len(requests)


def test_no_text_is_scored_twice() -> None:
    case = setting()
    requests = case.requests()
    sequences, responses = [r.sequence for r in requests], [r.response for r in requests]
    evaluated = case.objective.evaluate(requests[:2])
    rewards = case.objective.rewards(sequences, responses)
    assert rewards[:2] == [e.reward for e in evaluated]
    assert [s.stats.reward_calls for s in sequences] == [0, 0, 1, 1]
    assert case.objective.rewards(sequences, responses) == rewards
    assert [s.stats.reward_calls for s in sequences] == [0, 0, 1, 1]
    case.objective.rewards(sequences[:1], [responses[0][:-1]])
    assert sequences[0].stats.reward_calls == 1


def test_a_reward_that_is_not_finite_is_an_error_that_names_the_model() -> None:
    def broken(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return inputs_embeds.sum((1, 2)) * float("inf")

    language_model = LanguageModel(shared_language_model("llama", tied=True, vocab_rows=None), TOKENIZER)
    objective = Objective(language_model, RewardModel(broken, None, language_model, TOKENIZER), CONFIG)
    request = Setting(None, None, objective).request(*CASES[0])
    with pytest.raises(FloatingPointError, match=r"^reward_model \(broken\) gave a value"):
        objective.rewards([request.sequence], [request.response])


@pytest.mark.parametrize(("nll_coeff", "reward_coeff"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_weight_of_zero_switches_its_part_off(nll_coeff: float, reward_coeff: float) -> None:
    case = setting(nll_coeff=nll_coeff, reward_coeff=reward_coeff)
    (ours,) = case.objective.evaluate([case.request(*CASES[0])])
    assert bool((ours.factors.embedding == 0).all()) is (nll_coeff == 0)
    assert bool((ours.factors.reward_embedding == 0).all()) is (reward_coeff == 0)
    norm = ops.gradient_norm(ours.factors, case.objective.tables)
    assert bool((norm == 0).all()) is (nll_coeff == reward_coeff == 0)


def test_evaluations_hold_no_graph_and_work_inside_inference_mode() -> None:
    case = setting(gradient_cache=False)
    expected = case.objective.evaluate(case.requests())
    with torch.inference_mode():
        # Made in inference mode, as under a caller's decorator, so that the frames are inference tensors.
        inside = case.objective.evaluate(case.requests())
    for ours, meant in zip(inside, expected, strict=True):
        assert not any(f.requires_grad for f in ours.factors)
        same(ours, meant)


# The cache


def counters(request: Request) -> tuple[int, int, int]:
    stats = request.sequence.stats
    return stats.gradient_evaluations, stats.cache_hits, stats.cache_misses


def test_the_same_response_is_evaluated_once_and_looked_up_after() -> None:
    case = setting()
    requests = case.requests()
    first = case.objective.evaluate(requests)
    assert [counters(r) for r in requests] == [(1, 0, 1)] * len(requests)
    again = case.objective.evaluate(requests)
    assert [counters(r) for r in requests] == [(1, 1, 1)] * len(requests)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.factors, other.factors, strict=True))


def test_without_a_cache_everything_is_evaluated_and_nothing_looked_up() -> None:
    case = setting(gradient_cache=False)
    request = case.request(*CASES[0])
    for times in (1, 2):
        case.objective.evaluate([request])
        assert counters(request) == (times, 0, 0)


def test_a_later_position_is_found_and_an_earlier_one_is_not() -> None:
    case = setting()
    sequence, response = case.request(*CASES[2]).sequence, case.request(*CASES[2]).response
    middle, later, earlier = (Request(sequence, response, start) for start in (4, 7, 1))
    case.objective.evaluate([middle])
    (found,) = case.objective.evaluate([later])
    assert counters(later) == (1, 1, 1)
    other = setting(gradient_cache=False)
    (fresh,) = other.objective.evaluate([other.request(*CASES[2][:2], 7)])
    for mine, theirs in zip(found.rows_from(7), fresh.rows_from(7), strict=True):
        close(mine, theirs)
    (wider,) = case.objective.evaluate([earlier])
    assert counters(earlier) == (2, 1, 2)
    assert (wider.start, len(wider.factors.hidden)) == (1, len(response) - 1)


def test_found_and_missing_responses_come_back_in_the_order_asked_for() -> None:
    case = setting()
    requests = case.requests()
    case.objective.evaluate([requests[2], requests[0]])
    expected = setting(gradient_cache=False).objective.evaluate(requests)
    for ours, meant in zip(case.objective.evaluate(requests), expected, strict=True):
        same(ours, meant)
    assert [counters(r)[1] for r in requests] == [1, 0, 1, 0]


def test_prompts_and_responses_that_concatenate_to_the_same_tokens_are_kept_apart() -> None:
    case = setting()
    one = case.request(*CASES[0])
    prompt, response = one.sequence.prompt_ids, one.response
    other = Request(Sequence((*prompt, int(response[0])), (), 0, 64, one.sequence.frame), response[1:], 0)
    case.objective.evaluate([one, other])
    assert counters(other) == (1, 0, 1)
    assert not torch.equal(one.sequence.cache_key(one.response), other.sequence.cache_key(other.response))
    framed = Sequence(prompt, (), 0, 64, case.request(*CASES[1]).sequence.frame)
    assert not torch.equal(framed.cache_key(response), one.sequence.cache_key(response))


def test_cached_tensors_keep_no_more_memory_than_is_counted() -> None:
    """A view would keep the states of the whole batch alive, prompts and padding included."""
    case = setting()
    evaluations = case.objective.evaluate(case.requests())
    kept = [x for e in evaluations for x in (*e.factors, e.log_likelihoods)]
    kept += [r.sequence.cache_key(r.response) for r in case.requests()]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert case.objective.cache is not None
    assert sum(held.values()) == case.objective.cache.bytes


def test_a_small_budget_is_kept_and_changes_no_result() -> None:
    roomy, tight = setting(), setting(gradient_cache_bytes=6000)
    for _ in range(2):
        for ours, meant in zip(
            tight.objective.evaluate(tight.requests()), roomy.objective.evaluate(roomy.requests()), strict=True
        ):
            same(ours, meant)
    assert tight.objective.cache is not None
    assert tight.objective.cache.bytes <= 6000
    assert tight.objective.cache.stats()["evictions"] > 0


# Values that are not finite


def test_nan_in_the_language_model_is_an_error_that_names_it() -> None:
    language = tiny_language_model("llama")
    language_model = LanguageModel(language, TOKENIZER)
    reward_model = RewardModel(shared_reward_model("qwen3"), REWARD_TOKENIZER, language_model, TOKENIZER)
    objective = Objective(language_model, reward_model, CONFIG)
    with torch.no_grad():
        language.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    case = Setting(language, None, objective)
    with pytest.raises(FloatingPointError, match=r"^model \(LlamaForCausalLM\) gave"):
        objective.evaluate([case.request(*CASES[0])])


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("value", lambda embeds, mask: embeds.sum((1, 2)) * float("nan")),
        ("gradient", lambda embeds, mask: (embeds * 0).square().sum((1, 2)).sqrt()),
    ],
)
def test_nan_in_the_reward_model_is_an_error_that_names_it(name: str, reward: Any) -> None:
    reward.__name__ = name
    language_model = LanguageModel(shared_language_model("llama", tied=True, vocab_rows=None), TOKENIZER)
    objective = Objective(language_model, RewardModel(reward, None, language_model, TOKENIZER), CONFIG)
    case = Setting(None, None, objective)
    with pytest.raises(FloatingPointError, match=rf"^reward_model \({name}\)"):
        objective.evaluate([case.request(*CASES[0])])


def test_reward_without_a_gradient_is_an_error_that_names_the_model() -> None:
    def constant(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return attention_mask.sum(1).double()

    language_model = LanguageModel(shared_language_model("llama", tied=True, vocab_rows=None), TOKENIZER)
    reward_model = RewardModel(constant, None, language_model, TOKENIZER)
    objective = Objective(language_model, reward_model, CONFIG)
    case = Setting(None, None, objective)
    request = case.request(*CASES[0])
    assert objective.rewards([request.sequence], [request.response]) == [len(embedded(reward_model, request))]
    with pytest.raises((ValueError, TypeError), match=r"^reward_model \(constant\)"):
        objective.evaluate([request])


def embedded(reward_model: RewardModel, request: Request) -> Tensor:
    return reward_model.conversation(request.sequence.frame, request.response).embeds


def test_time_is_charged_to_the_phases_that_ran() -> None:
    case = setting(gradient_cache=False)
    request = case.request(*CASES[0])
    case.objective.evaluate([request])
    seconds = dict(request.sequence.stats.seconds)
    assert seconds["gradient"] > 0
    assert seconds["reward"] == 0
    case.objective.rewards([request.sequence], [request.response])
    assert request.sequence.stats.seconds["reward"] > 0
    assert request.sequence.stats.seconds["gradient"] == seconds["gradient"]


def test_callable_reward_factors_equal_autograd() -> None:
    """A reward that is no transformers model: quadratic, so that its gradient depends on the response."""
    language_model = LanguageModel(shared_language_model("gemma3", tied=True, vocab_rows=None), TOKENIZER)
    direction = torch.randn(
        language_model.embedding.weight.shape[1], generator=torch.Generator().manual_seed(0)
    ).double()

    class Quadratic(nn.Module):
        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return ((inputs_embeds @ direction) * attention_mask).sum(1).square()

    objective = Objective(language_model, RewardModel(Quadratic(), None, language_model, TOKENIZER), CONFIG)
    requests = [Setting(None, None, objective).request(*case) for case in CASES]
    for request, ours in zip(requests, objective.evaluate(requests), strict=True):
        total = float((embedded(objective.reward_model, request) @ direction).sum())
        slope = -CONFIG.reward_coeff * 2 * total * language_model.embedding.scale
        close(ours.factors.reward_embedding, (slope * direction).expand_as(ours.factors.reward_embedding), 1e-8)
        assert ours.reward == pytest.approx(total**2, rel=1e-12)


@pytest.mark.parametrize("failing", ["_likelihood_gradient", "gradient", None])
def test_the_reward_models_stream_is_waited_for_also_after_an_error(
    failing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    def fail(*_: Any) -> None:
        raise KeyError(failing)

    waits: list[tuple[str, str]] = []
    case, current = setting(), Stream("current")
    monkeypatch.setattr(case.objective._side, "_stream", Stream("reward"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: waits.append(("kept", stream.name)))
    request = case.request(*CASES[0])
    if failing is None:
        case.objective.evaluate([request])
        assert waits[:2] == [("reward", "current"), ("current", "reward")]
        assert set(waits[2:]) == {("kept", "current")}
        return
    monkeypatch.setattr(case.objective._reward_side if failing == "gradient" else case.objective, failing, fail)
    with pytest.raises(KeyError, match=failing):
        case.objective.evaluate([request])
    assert waits == [("reward", "current"), ("current", "reward")]
    monkeypatch.setattr(case.objective.reward_model, "rewards", fail)
    with pytest.raises(KeyError):
        case.objective.rewards([request.sequence], [request.response])
    assert waits[2:] == waits[:2]
