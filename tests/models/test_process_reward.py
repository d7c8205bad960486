"""Rewards and gradients of process reward models against a plain reading of their own forward passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_dto import DensePair, dense_dto, partners
from process_kinds import (
    CONFIG,
    END,
    KINDS,
    MARK,
    MARKED,
    RESPONSES,
    TOKENIZER,
    Kind,
    V,
    ids,
    new_sequence,
    objective_of,
    qwen,
    trl,
)
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

import nabla_fast as nf
from nabla_fast.models.steps import AGGREGATIONS, step_ends
from nabla_fast.objective import Request
from nabla_fast.testing.models import (
    MESSAGES,
    prompt_ids,
    shared_language_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Where steps end


@pytest.mark.parametrize(
    ("pieces", "separator", "ends", "unfinished"),
    [
        ([], "\n", [], True),
        (["\n", " ", "\n"], "\n", [], True),
        (["a", "\n"], "\n", [1], False),
        (["a", "\n", "b"], "\n", [1], True),
        (["a", ".\n\n", "b", "\n", "\n", "\n"], "\n\n", [1, 4], False),
        (["a\n", "\nb"], "\n\n", [1], True),
        (["a", "\n", "\n", "\n", "\n", "b"], "\n\n", [2], True),
        (["a\nb\nc\n"], "\n", [0], False),
        (["a", "", "<s", "tep>", " ", "<step>"], "<step>", [3], False),
    ],
)
def test_steps_end_at_the_token_that_completes_a_separator(
    pieces: list[str], separator: str, ends: list[int], unfinished: bool
) -> None:
    assert step_ends(pieces, separator) == (ends, unfinished)
    # By the tokens before it alone.
    for length in range(len(pieces)):
        assert step_ends(pieces[:length], separator)[0] == [i for i in ends if i < length]


# Rewards and gradients


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_rewards_and_gradients_are_those_of_whole_conversations(name: str, aggregation: str) -> None:
    kind = KINDS[name](aggregation)
    objective = objective_of(kind, gradient_cache=False)
    assert objective.reward_model.supports_prefix_cache is not kind.inserted
    opening = prompt_ids(kind.tokenizer)
    requests = [
        Request(new_sequence(objective), torch.tensor(ids(text)), start)
        for text in RESPONSES
        for start in (0, len(ids(text)) // 2, len(ids(text)) - 1)
    ]
    several = 0
    for request, evaluation in zip(requests, objective.evaluate(requests), strict=True):
        response = request.response.tolist()
        rows = kind.table[response].requires_grad_()
        # An end token alone has no part in the score.
        reward = kind.reward(opening, response, rows) + 0 * rows.sum()
        (gradient,) = torch.autograd.grad(reward, rows)
        several += sum(kind.ends(response)) > 1
        assert evaluation.reward == pytest.approx(float(reward.detach()), abs=1e-12)
        expected = -CONFIG.reward_coeff * gradient[request.start :]
        torch.testing.assert_close(evaluation.factors[2], expected, rtol=0, atol=1e-11)
        # Scored behind what the caches have by now.
        (scored,) = objective.rewards([request.sequence], [request.response])
        assert scored == pytest.approx(float(reward.detach()), abs=1e-12)
    assert several, "no response had two steps"


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_finite_differences(name: str) -> None:
    objective = objective_of(KINDS[name]("product"))
    model = objective.reward_model
    frame = model.chat_frame(MESSAGES)
    conversation = model.conversation(frame, torch.tensor(ids("at 12\n\n24\n\n36")))
    x = conversation.differentiable()
    (reward,), _ = model.rewards([x])
    (gradient,) = torch.autograd.grad(reward, x.embeds)
    direction = torch.randn(x.embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-5

    def moved(sign: int) -> float:
        embeds = conversation.embeds + sign * step * direction
        return float(model.rewards([type(conversation)(conversation.ids, embeds, x.reads, x.places)])[0])

    measured = (moved(1) - moved(-1)) / (2 * step)
    assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
    assert abs(measured) > 1e-6


def test_the_least_step_alone_has_a_gradient() -> None:
    kind = trl("min")
    objective = objective_of(kind)
    response = ids("at 12\n24 is it\n36 the ans")
    (evaluation,) = objective.evaluate([Request(new_sequence(objective), torch.tensor(response), 0)])
    moved = evaluation.factors[2].abs().sum(1) > 0
    ends = [i for i, end in enumerate(kind.ends(response)) if end] + [len(response) - 1]
    scores = {}
    for end in ends:
        part = response[: end + 1]
        rows = kind.table[part]
        scores[end] = float(Kind(nf.ProcessReward(kind.model, "\n", "last"), TOKENIZER, "\n", False).reward(
            prompt_ids(TOKENIZER), part, rows
        ))  # fmt: skip
    least = min(scores, key=scores.__getitem__)
    assert moved.tolist() == [i <= least for i in range(len(response))]


def test_a_product_of_small_scores_is_right() -> None:
    scores = torch.tensor([-60.0, -30.0], dtype=torch.float64)
    assert float(AGGREGATIONS["product"](scores)) == pytest.approx(float(torch.tensor(-90.0).double().exp()), rel=1e-12)
    tied = torch.tensor([-1.0, -1.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(AGGREGATIONS["min"](tied), tied)
    assert (gradient > 0).sum() == 1


@pytest.mark.parametrize("name", ["trl", "Qwen"])
def test_dto_equals_dense_autograd(name: str) -> None:
    kind = KINDS[name]("mean", family="qwen3") if name == "trl" else KINDS[name]("mean", after="t")
    if name == "trl":
        kind = trl("mean", "qwen3", separator="t")

    class Pair(DensePair):
        def reward(self, prefix: Any, ahead: Tensor) -> Tensor:
            response = torch.cat([torch.eye(V, dtype=ahead.dtype)[list(prefix)], ahead])
            return kind.reward(self.opening, response.argmax(-1).tolist(), response @ self.reward_embedding)

    model = shared_language_model("llama")
    config = nf.NablaConfig(
        anchor="argmax", max_iters=12, learning_rate=0.25, nll_coeff=0.4, reward_coeff=20.0, update_postfix=True
    )
    start = torch.randn(6, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prefix = ids("it is")
    ours = nf.dto.optimize(model, TOKENIZER, kind.process, kind.tokenizer, list(MESSAGES), prefix, start, config)
    opening = prompt_ids(kind.tokenizer)
    dense = Pair(model, kind.model, V, prompt_ids(TOKENIZER), opening, [], partners(TOKENIZER, kind.tokenizer))
    expected = dense_dto(dense, prefix, start, config)
    torch.testing.assert_close(ours.parameters, expected.parameters, rtol=0, atol=1e-9)
    assert ours.tokens.tolist() == expected.tokens
    assert [step.reward for step in ours.trace] == pytest.approx(expected.rewards, abs=1e-9)
    assert len(set(expected.history)) > 1, "no token changed"
    assert len({sum(kind.ends([*prefix, *tokens])) for tokens in expected.history}) > 1, "no step came or went"


@pytest.mark.parametrize("values_prefixes", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_prefix_rewards_are_those_of_responses_that_end_there_or_of_their_last_token(
    name: str, values_prefixes: bool
) -> None:
    kind = KINDS[name]("mean")
    kind.process = replace(kind.process, values_prefixes=values_prefixes)
    objective = objective_of(kind)
    prefixes = [ids("at 12\n\nit"), ids("at 12\n\n"), []]
    candidates = [[*ids("\n"), 9, END], [9, 30], [9, END]]
    found = objective.prefix_rewards([new_sequence(objective) for _ in prefixes], [
        torch.tensor(prefix, dtype=torch.long) for prefix in prefixes
    ], candidates)  # fmt: skip
    opening = prompt_ids(kind.tokenizer)
    for prefix, own, rewards in zip(prefixes, candidates, found, strict=True):
        expected = [float(kind.reward(opening, [*prefix, t], kind.table[[*prefix, t]], ended=False)) for t in own]
        assert rewards == pytest.approx(expected, abs=1e-12)
        (whole,) = objective.rewards([new_sequence(objective)], [torch.tensor([*prefix, own[-1]])])
        assert whole == pytest.approx(float(kind.reward(opening, [*prefix, own[-1]], kind.table[[*prefix, own[-1]]])))


def test_the_separator_is_inserted_into_the_reward_models_conversation_alone() -> None:
    kind = qwen(after="\n")
    model = objective_of(kind).reward_model
    frame = model.chat_frame(MESSAGES)
    response = torch.tensor(ids("at 12\nit is\n"))
    conversation = model.conversation(frame, response)
    text = MARKED.decode(conversation.ids[len(frame.opening) :])
    assert text == f"at 12\n{MARK}it is\n{MARK}"
    shown = conversation.ids[[*conversation.places]]
    assert MARKED.decode(shown) == TOKENIZER.decode(response)
    assert MARKED.decode(model.conversation(frame, response[:-1]).ids[len(frame.opening) :]) == (
        f"at 12\n{MARK}it is{MARK}"
    )
    assert MARKED.decode(model.conversation(frame, response[:0]).ids[len(frame.opening) :]) == MARK


# Models that are run as they are


def test_a_model_with_an_unknown_head_is_run_as_it_is() -> None:
    kind = trl("mean")
    own = kind.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * torch.tensor([1.0, -2.0], dtype=torch.float64)
        return out

    kind.model.forward = forward
    with pytest.warns(UserWarning, match="is run as it is, on whole .* its own forward pass differs"):
        objective = objective_of(kind)
    assert not objective.reward_model.supports_prefix_cache
    response = ids("at 12\n24\n36")
    (evaluation,) = objective.evaluate([Request(new_sequence(objective), torch.tensor(response), 2)])
    rows = kind.table[response].requires_grad_()
    reward = kind.reward(prompt_ids(TOKENIZER), response, rows)
    (gradient,) = torch.autograd.grad(reward, rows)
    assert evaluation.reward == pytest.approx(float(reward.detach()), abs=1e-12)
    torch.testing.assert_close(evaluation.factors[2], -CONFIG.reward_coeff * gradient[2:], rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bidirectional_classifier_takes_whole_conversations() -> None:
    config = BertConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    torch.manual_seed(0)
    model = BertForTokenClassification(config).double().eval().requires_grad_(False)
    kind = Kind(nf.ProcessReward(model, "\n", "mean"), TOKENIZER, "\n", False)
    objective = objective_of(kind)
    assert not objective.reward_model.supports_prefix_cache
    response = ids("at 12\n24\n36")
    (evaluation,) = objective.evaluate([Request(new_sequence(objective), torch.tensor(response), 0)])
    embed = model.get_input_embeddings()
    conversation = torch.tensor([*prompt_ids(TOKENIZER), *response, *ids("\n")])
    reads = [i + len(prompt_ids(TOKENIZER)) for i, end in enumerate(kind.ends(response)) if end]
    rows = embed(conversation).detach().requires_grad_()
    logits = model(inputs_embeds=rows.unsqueeze(0)).logits[0, [*reads, len(conversation) - 1]]
    reward = logits.softmax(-1)[:, 1].mean()
    assert evaluation.reward == pytest.approx(float(reward.detach()), abs=1e-6)
