"""Language and reward models as the algorithm uses them, against transformers' own forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel

from nabla_fast.models.backbone import Inputs
from nabla_fast.models.language_model import LanguageModel, embedding_table
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.testing.models import (
    CLOSING,
    CONTEXT,
    FAMILIES,
    MESSAGES,
    WIDTH,
    prompt_ids,
    shared_language_model,
    shared_reward_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
# One shorter than the sliding window of the Gemma models, two longer.
SEQUENCES = list(TOKENIZER(["at 12", "what is the time 10", "3 times 4 is 12 + 24."])["input_ids"])


def wrapped(family: str, *, tied: bool = True, vocab_rows: int | None = None) -> tuple[Any, LanguageModel]:
    model = shared_language_model(family, tied=tied, vocab_rows=vocab_rows)
    return model, LanguageModel(model, TOKENIZER)


def last_hidden(model: Any, tokens: Sequence[int]) -> Tensor:
    """By the model's own forward over one whole sequence."""
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0]


def total(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    """A callable reward."""
    return (inputs_embeds.sum(-1) * attention_mask).sum(1)


# The helpers themselves


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_compute_in_float64(family: str) -> None:
    """A central difference is right to 1e-7 only if no float32 rounding is on the way."""
    for model in (shared_language_model(family, tied=True, vocab_rows=None), shared_reward_model(family)):
        embeds = model.get_input_embeddings()(torch.tensor([SEQUENCES[2]]))
        direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def value(x: Tensor, model: Any = model) -> Tensor:
            return model(inputs_embeds=x, use_cache=False).logits.sin().sum()

        leaf = embeds.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        exact, step = float((gradient * direction).sum()), 1e-5
        difference = float(value(embeds + step * direction) - value(embeds - step * direction)) / (2 * step)
        assert abs(exact) > 1e-3
        assert difference == pytest.approx(exact, rel=1e-5)


def test_sequences_are_shorter_and_longer_than_the_sliding_window() -> None:
    window = shared_language_model("gemma2", tied=True, vocab_rows=None).config.sliding_window
    shortest, *longer = sorted(len(s) for s in SEQUENCES)
    assert shortest < window < min(longer)
    assert len(set(longer)) == 2


def test_tiny_tokenizer_round_trips_chats_and_cuts_missing_tokens() -> None:
    text = TOKENIZER.apply_chat_template(list(MESSAGES), tokenize=False)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert TOKENIZER.unk_token_id not in prompt_ids(TOKENIZER)
    other = tiny_tokenizer(shuffle=1, missing=("ans",))
    assert other("ans12").tokens() == ["an", "s", "12"]
    assert set(TOKENIZER.get_vocab()) - set(other.get_vocab()) == {"ans"}
    assert sum(i != other.get_vocab().get(t) for t, i in TOKENIZER.get_vocab().items()) > V // 2


# Language models


@pytest.mark.parametrize("vocab_rows", [None, 96])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_over_the_tokenizers_tokens(family: str, tied: bool, vocab_rows: int | None) -> None:
    model, ours = wrapped(family, tied=tied, vocab_rows=vocab_rows)
    tokens = SEQUENCES[2]
    theirs = model(input_ids=torch.tensor([tokens])).logits[0, :, :V]
    assert ours.vocab_size == V
    torch.testing.assert_close(ours.logits(last_hidden(model, tokens)), theirs, rtol=0, atol=1e-10)


def test_models_with_fewer_rows_than_the_tokenizer_keep_their_own_size() -> None:
    _, ours = wrapped("llama", vocab_rows=80)
    assert ours.vocab_size == len(ours.head.weight) == len(ours.embedding.weight) == 80


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_embedding_modules_own(family: str) -> None:
    model, ours = wrapped(family, vocab_rows=96)
    ids = torch.arange(V)
    torch.testing.assert_close(ours.embedding(ids), model.get_input_embeddings()(ids), rtol=0, atol=1e-12)
    assert ours.embedding.weight.shape == (V, WIDTH)
    # float32 holds the Gemma models' scale.
    assert ours.embedding.scale == pytest.approx(WIDTH**0.5 if "gemma" in family else 1.0, rel=1e-7)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_embedding_scale_is_found_where_the_first_rows_are_zero(family: str) -> None:
    """Rows of tokens that were never trained can be exactly zero."""
    model = tiny_language_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:20] = 0
    ours = LanguageModel(model, TOKENIZER)
    ids = torch.arange(V)
    torch.testing.assert_close(ours.embedding(ids), model.get_input_embeddings()(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embedding_scale_is_found_in_lower_precision(dtype: torch.dtype) -> None:
    for family, scale in (("gemma3", WIDTH**0.5), ("qwen2", 1.0)):
        ours = LanguageModel(tiny_language_model(family, dtype=dtype), TOKENIZER)
        assert ours.embedding.scale == pytest.approx(scale, rel=5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_a_ragged_batch_equal_each_sequence_alone(family: str) -> None:
    model, ours = wrapped(family)
    hidden, states = ours.backbone([None] * len(SEQUENCES), [ours.embedding.inputs(s) for s in SEQUENCES])
    for rows, state, tokens in zip(hidden, states, SEQUENCES, strict=True):
        torch.testing.assert_close(rows, last_hidden(model, tokens), rtol=0, atol=1e-10)
        assert torch.equal(state.hidden, rows)


def test_context_length_and_device_are_the_models() -> None:
    for family in FAMILIES:
        _, ours = wrapped(family)
        assert ours.context_length == CONTEXT
        assert ours.device == torch.device("cpu")


class _Adapter:
    """What peft puts around a model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_base_model(self) -> Any:
        return self._model


def test_adapters_are_looked_through() -> None:
    model, ours = wrapped("llama")
    assert LanguageModel(_Adapter(model), TOKENIZER).model is model
    rewards = RewardModel(_Adapter(shared_reward_model("qwen3")), None, ours, TOKENIZER)
    assert rewards.context_length == CONTEXT


def test_language_models_of_an_unknown_kind_are_refused_by_name() -> None:
    backbone = LlamaModel(shared_language_model("llama", tied=True, vocab_rows=None).config).eval()
    for headless in (backbone, shared_reward_model("qwen3"), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"^model .* has no output head"):
            LanguageModel(headless, TOKENIZER)

    with pytest.raises(ValueError, match=r"^draft_model .* is in training mode"):
        LanguageModel(tiny_language_model("llama").train(), TOKENIZER, argument="draft_model")


@pytest.mark.parametrize("change", ["scaled", "shifted", "squashed"])
def test_language_models_whose_logits_are_not_their_heads_are_refused(change: str) -> None:
    model = tiny_language_model("llama")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        change_of = {
            "scaled": lambda z: z * 1.1,
            "shifted": lambda z: z + 0.5,
            "squashed": lambda z: 4 * (z / 4).tanh(),
        }
        out.logits = change_of[change](out.logits)
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="computes its logits in a way that nabla_fast does not know"):
        LanguageModel(model, TOKENIZER)


@pytest.mark.parametrize(("name", "value", "factor"), [("logits_scaling", 4.0, 0.25), ("logit_scale", 0.5, 0.5)])
def test_constant_factors_on_the_logits_are_read_from_the_configuration(name: str, value: float, factor: float) -> None:
    model = tiny_language_model("llama")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * factor
        return out

    model.forward = forward
    setattr(model.config, name, value)
    assert LanguageModel(model, TOKENIZER).head.scale == factor


def test_embeddings_that_are_no_scaled_table_are_refused() -> None:
    model = tiny_language_model("llama", tied=False)
    embedding = model.get_input_embeddings()
    embedding.forward = lambda ids: nn.functional.embedding(ids, embedding.weight) + 1.0
    with pytest.raises(ValueError, match="embeddings that are not a scaled table"):
        embedding_table(model, "model")


# Reward models


def reward_of(family: str, tokenizer: Any = None, **options: Any) -> tuple[Any, RewardModel]:
    model = shared_reward_model(family)
    _, language_model = wrapped("llama")
    return model, RewardModel(model, tokenizer, language_model, TOKENIZER, **options)


def embedded(ours: RewardModel, frame: Any, tokens: list[int]) -> Inputs:
    return ours.conversation(frame, torch.tensor(tokens, dtype=torch.long))


def scores(ours: RewardModel, conversations: list[Inputs]) -> Tensor:
    rewards, _ = ours.rewards(conversations)
    return rewards


def response_ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer(shuffle=2)], ids=["same", "shuffled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_equal_the_classifiers_own_forward_and_a_batch_equals_each_alone(family: str, tokenizer: Any) -> None:
    model, ours = reward_of(family, tokenizer)
    own = tokenizer or TOKENIZER
    chats = [
        (MESSAGES, "the ans is 12"),
        ([{"role": "system", "content": "on"}, {"role": "user", "content": "at 3 + 4 + 10 = ?"}], "it is 36 or 48."),
        ([{"role": "user", "content": "is it"}], "12"),
    ]
    expected = []
    for chat, response in chats:
        whole = [*chat, {"role": "assistant", "content": response}]
        ids = own.apply_chat_template(whole, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits))
    conversations = [embedded(ours, ours.chat_frame(chat), response_ids(response)) for chat, response in chats]
    assert len({len(c) for c in conversations}) == 3
    for conversation, reward in zip(conversations, expected, strict=True):
        assert float(scores(ours, [conversation])) == pytest.approx(reward, abs=1e-10)
    assert scores(ours, conversations).tolist() == pytest.approx(expected, abs=1e-10)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gets_no_gradient_and_changes_none(family: str) -> None:
    _, ours = reward_of(family)
    frame = ours.chat_frame(MESSAGES)
    texts = ("the ans is 12", "3", "it is 36 or 48.")
    conversations = [embedded(ours, frame, response_ids(t)).differentiable() for t in texts]
    together = torch.autograd.grad(scores(ours, conversations).sum(), [x.embeds for x in conversations])
    for conversation, gradient in zip(conversations, together, strict=True):
        (alone,) = torch.autograd.grad(scores(ours, [conversation]).sum(), conversation.embeds)
        torch.testing.assert_close(gradient, alone, rtol=0, atol=1e-10)
        assert float(alone.abs().max()) > 1e-3


def test_response_that_ends_its_turn_is_not_closed_twice() -> None:
    for tokenizer in (None, tiny_tokenizer(shuffle=2)):
        _, ours = reward_of("qwen3", tokenizer)
        frame = ours.chat_frame(MESSAGES)
        response = response_ids("the ans is 12")
        open_end = embedded(ours, frame, response)
        ended = embedded(ours, frame, [*response, TOKENIZER.eos_token_id])
        assert torch.equal(open_end.embeds, ended.embeds)
        # Only the end-of-turn token itself is one of the two.
        newline = embedded(ours, frame, [*response, *response_ids("\n")])
        assert len(newline) == len(open_end) + 1
        empty = embedded(ours, frame, [])
        assert torch.equal(empty.embeds, torch.cat([frame.opening.embeds, frame.closing.embeds]))


def test_frame_of_prompt_ids_is_the_aligned_prompt_closed_by_the_template() -> None:
    other = tiny_tokenizer(shuffle=2)
    model, ours = reward_of("qwen3", other)
    frame = ours.prompt_frame(prompt_ids(TOKENIZER))
    embed = model.get_input_embeddings()
    for part, ids in ((frame.opening, prompt_ids(other)), (frame.closing, other(CLOSING)["input_ids"])):
        assert part.ids.tolist() == ids
        assert torch.equal(part.embeds, embed(torch.tensor(ids)))
    assert torch.equal(frame.opening.ids, ours.chat_frame(MESSAGES).opening.ids)


def test_tokenizer_without_a_template_closes_prompts_with_nothing() -> None:
    _, ours = reward_of("qwen3", tiny_tokenizer(chat_template=None))
    assert len(ours.prompt_frame(prompt_ids(TOKENIZER)).closing) == 0
    with pytest.raises(ValueError, match=r"^reward_tokenizer .* has no chat template"):
        ours.chat_frame(MESSAGES)


@pytest.mark.filterwarnings("ignore:.*no partner:UserWarning")
def test_end_tokens_without_a_partner_are_shown_as_the_templates_end_of_turn() -> None:
    missing = TOKENIZER.get_vocab()["ans"]
    other = tiny_tokenizer(shuffle=2, missing=("ans",))
    model, ours = reward_of("qwen3", other, eos_token_ids=[missing, TOKENIZER.eos_token_id])
    end = model.get_input_embeddings()(torch.tensor(other.eos_token_id))
    assert torch.equal(ours.table(torch.tensor(missing)), end)
    frame = ours.chat_frame(MESSAGES)
    twelve = response_ids("12")
    assert torch.equal(embedded(ours, frame, [*twelve, missing]).embeds, embedded(ours, frame, twelve).embeds)


def test_callable_sees_the_language_models_embeddings_or_its_own() -> None:
    model, language_model = wrapped("gemma3")
    seen: list[tuple[Tensor, Tensor]] = []

    def reward(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append((inputs_embeds, attention_mask))
        return total(inputs_embeds, attention_mask)

    ours = RewardModel(reward, None, language_model, TOKENIZER)
    responses = [response_ids("12"), response_ids("it is 24")]
    frame = ours.chat_frame(MESSAGES)
    rewards = scores(ours, [embedded(ours, frame, r) for r in responses])
    embeds, mask = seen[0]
    for row, response in enumerate(responses):
        ids = [*prompt_ids(TOKENIZER), *response, *TOKENIZER(CLOSING)["input_ids"]]
        assert mask[row].tolist() == [1] * len(ids) + [0] * (mask.shape[1] - len(ids))
        expected = model.get_input_embeddings()(torch.tensor(ids))
        torch.testing.assert_close(embeds[row, : len(ids)], expected, rtol=0, atol=1e-12)
        assert float(rewards[row]) == pytest.approx(float(expected.sum()), abs=1e-9)

    class OwnEmbeddings:
        def __init__(self) -> None:
            self.table = nn.Embedding(V, 7, dtype=torch.float64)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            assert inputs_embeds.shape[-1] == 7
            return total(inputs_embeds, attention_mask)

    own = OwnEmbeddings()
    shuffled = tiny_tokenizer(shuffle=2)
    theirs = RewardModel(own, shuffled, language_model, TOKENIZER)
    ids = [*prompt_ids(shuffled), *shuffled("12")["input_ids"], *shuffled(CLOSING)["input_ids"]]
    conversation = embedded(theirs, theirs.chat_frame(MESSAGES), response_ids("12"))
    torch.testing.assert_close(conversation.embeds, own.table(torch.tensor(ids)).detach(), rtol=0, atol=0)


def test_callable_without_embeddings_cannot_have_another_tokenizer() -> None:
    """It sees the language model's embeddings, in which another tokenizer's ids mean other tokens."""
    _, language_model = wrapped("llama")
    with pytest.raises(ValueError, match="reward_tokenizer"):
        RewardModel(total, tiny_tokenizer(shuffle=2), language_model, TOKENIZER)
    RewardModel(total, tiny_tokenizer(), language_model, TOKENIZER)


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        (lambda embeds, mask: embeds[:, 0, 0].unsqueeze(1), r"\(2, 1\)"),
        (lambda embeds, mask: embeds.sum(), r"\(\)"),
        (lambda embeds, mask: embeds[:1, 0, 0], r"\(1,\)"),
        (lambda embeds, mask: embeds[..., 0], r"\(2, "),
    ],
)
def test_callable_that_returns_another_shape_is_refused_by_name(wrong: Any, shape: str) -> None:
    _, language_model = wrapped("llama")
    wrong.__name__ = "my_reward"
    ours = RewardModel(wrong, None, language_model, TOKENIZER)
    conversation = embedded(ours, ours.chat_frame(MESSAGES), response_ids("12"))
    with pytest.raises(
        ValueError, match=rf"^reward_model \(my_reward\) must return rewards of shape \(2,\), got {shape}"
    ):
        scores(ours, [conversation, conversation])


def test_half_precision_rewards_are_widened() -> None:
    language_model = LanguageModel(tiny_language_model("llama", dtype=torch.bfloat16), TOKENIZER)
    model = tiny_reward_model("qwen3", dtype=torch.bfloat16)
    ours = RewardModel(model, None, language_model, TOKENIZER)
    rewards = scores(ours, [embedded(ours, ours.chat_frame(MESSAGES), response_ids("12"))])
    assert rewards.dtype == torch.float32


def test_reward_models_of_another_kind_are_refused_by_name() -> None:
    language, language_model = wrapped("llama")
    with pytest.raises(ValueError, match=r"^reward_model .* has 3 labels; a reward model has one"):
        RewardModel(tiny_reward_model("llama", labels=3), None, language_model, TOKENIZER)
    with pytest.raises(ValueError, match=r"^reward_model .* is in training mode"):
        RewardModel(tiny_reward_model("llama").train(), None, language_model, TOKENIZER)
    with pytest.raises(ValueError, match=r"^reward_model .* gives a score for every token of a conversation"):
        RewardModel(language, None, language_model, TOKENIZER)
    for wrong in (None, "a/path", 3.0):
        with pytest.raises(TypeError, match=r"^reward_model must be a sequence classifier .* or a callable"):
            RewardModel(wrong, None, language_model, TOKENIZER)


def test_conversation_longer_than_the_reward_models_context_is_refused() -> None:
    _, ours = reward_of("gpt2")
    frame = ours.chat_frame(MESSAGES)
    room = CONTEXT - len(frame.opening) - len(frame.closing)
    assert scores(ours, [embedded(ours, frame, [5] * room)]).isfinite().all()
    with pytest.raises(ValueError, match=f"takes at most {CONTEXT} tokens, got a conversation of {CONTEXT + 1}"):
        scores(ours, [embedded(ours, frame, [5] * (room + 1))])
