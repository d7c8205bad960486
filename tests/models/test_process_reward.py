"""Process reward models against a plain reading of their own forward passes, from disk and in whole decodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_dto import DensePair, dense_dto, partners
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models.backbone import Backbone
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.loading import load_reward_model
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.models.steps import AGGREGATIONS, step_ends
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    CONTEXT,
    MESSAGES,
    prompt_ids,
    shared_language_model,
    tiny_language_model,
    tiny_process_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MARK = "<extra_0>"
CONFIG = nf.NablaConfig(nll_coeff=0.3, reward_coeff=-1.7)
END = TOKENIZER.eos_token_id


def marked_tokenizer(shuffle: int | None = None) -> Any:
    """One that knows Qwen's separator."""
    tokenizer = tiny_tokenizer(shuffle=shuffle)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    return tokenizer


MARKED = marked_tokenizer(shuffle=6)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@dataclass
class Kind:
    """A model, how it is read, and a plain reading of the same."""

    process: nf.ProcessReward
    tokenizer: Any
    marker: str
    inserted: bool

    def __post_init__(self) -> None:
        self.model = self.process.model
        theirs = self.tokenizer.get_vocab()
        self.table = self.model.get_input_embeddings().weight[
            torch.tensor([theirs[t] for t in TOKENIZER.convert_ids_to_tokens(list(range(V)))])
        ]
        self.separator = self.tokenizer(self.process.separator, add_special_tokens=False)["input_ids"]

    def ends(self, response: list[int]) -> list[bool]:
        """Whether a step ends at each token; by the text so far, cut again for every token."""
        found, steps = [], 0
        for i in range(len(response)):
            text = "".join(TOKENIZER.decode([t]) for t in response[: i + 1])
            now = len([step for step in text.split(self.marker)[:-1] if step.strip()])
            found.append(now > steps)
            steps = now
        return found

    def reward(self, opening: list[int], response: list[int], rows: Tensor) -> Tensor:
        """The reward of a response whose tokens have the embeddings ``rows`` (n, d)."""
        embed = self.model.get_input_embeddings()
        if response and response[-1] == END:
            response, rows = response[:-1], rows[:-1]
        parts, reads = [embed(torch.tensor(opening))], []
        length, ends = len(opening), self.ends(response)
        text = "".join(TOKENIZER.decode([t]) for t in response)
        unfinished = bool(text.rsplit(self.marker, 1)[-1].strip()) or not any(ends)
        # The separator stands behind a whole token, whatever of it belongs to the next step.
        unfinished = unfinished and not (self.inserted and ends and ends[-1])
        for i, end in enumerate(ends):
            parts.append(rows[i : i + 1])
            length += 1
            if end and self.inserted:
                parts.append(embed(torch.tensor(self.separator)))
                length += 1
            if end:
                reads.append(length - 1)
        if unfinished:
            parts.append(embed(torch.tensor(self.separator)))
            reads.append(length + len(self.separator) - 1)
        logits = self.model(inputs_embeds=torch.cat(parts).unsqueeze(0), use_cache=False).logits[0, reads]
        scores = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]
        return {"min": scores.min(), "product": scores.prod(), "last": scores[-1], "mean": scores.mean()}[
            self.process.aggregation
        ]


def trl(aggregation: str = "min", family: str = "llama", separator: str = "\n", labels: int = 2) -> Kind:
    model = tiny_process_model(family, labels=labels)
    return Kind(nf.ProcessReward(model, separator, aggregation), TOKENIZER, separator, False)


def qwen(aggregation: str = "min", family: str = "qwen2", after: str | None = None) -> Kind:
    model = tiny_process_model(family, two_layers=True, vocab_rows=len(MARKED))
    return Kind(nf.ProcessReward(model, MARK, aggregation, after), MARKED, after or "\n\n", True)


KINDS: dict[str, Callable[..., Kind]] = {
    "trl": trl,
    "value head": lambda aggregation="min", **_: trl(aggregation, "qwen3", labels=1),
    "Qwen": qwen,
}
RESPONSES = [
    "the ans is 12",
    "it is 3\n\n\nthen 4\n\nthe ans is 12\n\n",
    "at 12\n\n24\n36",
    "\n\nthe\n",
    "10 + 2 is\n\n 12\n\nthe time<|end|>",
    "ans\n<|end|>",
    "<|end|>",
]


def objective_of(kind: Kind, **changes: Any) -> Objective:
    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)
    reward = ProcessRewardModel(kind.process, kind.tokenizer, language_model, TOKENIZER, [END])
    return Objective(language_model, reward, CONFIG.replace(**changes))


def new_sequence(objective: Objective) -> Sequence:
    frame = objective.reward_model.chat_frame(MESSAGES)
    return Sequence(tuple(prompt_ids(TOKENIZER)), (), 0, 64, frame)


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


@pytest.mark.parametrize("name", KINDS)
def test_prefix_rewards_are_those_of_responses_that_end_there(name: str) -> None:
    kind = KINDS[name]("mean")
    objective = objective_of(kind)
    prefixes = [ids("at 12\n\nit"), ids("at 12\n\n"), []]
    candidates = [[*ids("\n"), 9, END], [9, 30], [9, END]]
    found = objective.prefix_rewards([new_sequence(objective) for _ in prefixes], [
        torch.tensor(prefix, dtype=torch.long) for prefix in prefixes
    ], candidates)  # fmt: skip
    opening = prompt_ids(kind.tokenizer)
    for prefix, own, rewards in zip(prefixes, candidates, found, strict=True):
        expected = [float(kind.reward(opening, [*prefix, t], kind.table[[*prefix, t]])) for t in own]
        assert rewards == pytest.approx(expected, abs=1e-12)


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


# Decodes

DECODE = nf.NablaConfig(
    max_new_tokens=10,
    max_rollouts=4,
    confidence_threshold=0.99,
    gradient_threshold=None,
    max_iters=3,
    learning_rate=0.2,
    reward_coeff=10.0,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
)
PROMPTS = ["what is 3 times 4", "the user", "is it on"]


@pytest.mark.parametrize("proposal", ["dto", "prefix_reward", "guided", "first_order"])
def test_a_decode_behind_cached_prefixes_is_that_of_whole_conversations(proposal: str) -> None:
    kind = trl("mean", "qwen3", separator="s")
    config = DECODE.replace(proposal=proposal)
    arguments = (tiny_language_model("llama"), TOKENIZER, kind.process, kind.tokenizer, PROMPTS)
    cached = nf.generate(*arguments, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Backbone, "supports_prefix_cache", property(lambda self: False, lambda self, value: None), raising=False
        )
        whole = nf.generate(*arguments, config.replace(gradient_cache=False))
    assert [y.tolist() for y in cached.sequences] == [y.tolist() for y in whole.sequences]
    assert cached.rewards == pytest.approx(whole.rewards, abs=1e-9)
    assert any(sum(kind.ends(y.tolist())) > 1 for y in cached.sequences), "no answer had two steps"
    for tokens, reward, prompt in zip(cached.sequences, cached.rewards, PROMPTS, strict=True):
        opening = prompt_ids(TOKENIZER, [{"role": "user", "content": prompt}])
        expected = kind.reward(opening, tokens.tolist(), kind.table[tokens])
        assert reward == pytest.approx(float(expected), abs=1e-9)


def test_a_decode_with_an_inserted_separator_accepts_what_raises_the_reward() -> None:
    kind = qwen("product", after="s")
    model = tiny_language_model("llama")
    out = nf.generate(model, TOKENIZER, kind.process, MARKED, PROMPTS, DECODE)
    assert MARK not in "".join(out.texts)
    assert any(sum(kind.ends(y.tolist())) > 1 for y in out.sequences), "no answer had two steps"
    for tokens, reward, prompt in zip(out.sequences, out.rewards, PROMPTS, strict=True):
        opening = prompt_ids(MARKED, [{"role": "user", "content": prompt}])
        assert reward == pytest.approx(float(kind.reward(opening, tokens.tolist(), kind.table[tokens])), abs=1e-9)
    assert any(revision.accepted for revision in out.stats.totals.revisions)


def test_inserted_separators_have_room_in_the_context() -> None:
    """Even if every token ends a step, the reward model's context holds the conversation."""
    kind = qwen("last", after="s")
    pair = make_pair(shared_language_model("llama"), TOKENIZER, kind.process, MARKED, DECODE)
    prompts, frames = pair.prompts([MESSAGES], DECODE)
    with pytest.warns(UserWarning, match="has room for .* response tokens, fewer than"):
        (sequence,) = pair.sequences(prompts, frames, DECODE.replace(max_new_tokens=CONTEXT))
    model = pair.reward_model
    response = torch.tensor([*ids("s")] * sequence.limit)
    (reward,), _ = model.rewards([model.conversation(sequence.frame, response)])
    assert 0 <= float(reward) <= 1


def test_every_prompt_gets_in_a_batch_what_it_gets_alone() -> None:
    for kind, tokenizer in ((trl("mean", separator="s"), TOKENIZER), (qwen("min", after="s"), MARKED)):
        arguments = (tiny_language_model("llama"), TOKENIZER, kind.process, tokenizer)
        together = nf.generate(*arguments, PROMPTS, DECODE)
        for i, prompt in enumerate(PROMPTS):
            alone = nf.generate(*arguments, prompt, DECODE)
            assert alone.sequences[0].tolist() == together.sequences[i].tolist()
            assert alone.rewards[0] == pytest.approx(together.rewards[i], abs=1e-9)


def test_the_drop_in_shows_the_models_own_prompt() -> None:
    kind = qwen("last", after="s")
    model = tiny_language_model("llama")
    prompt = prompt_ids(TOKENIZER)
    drop_in = nf.custom_generate(TOKENIZER, kind.process, MARKED, DECODE)
    out = model.generate(
        torch.tensor([prompt]), custom_generate=drop_in, max_new_tokens=8, do_sample=True, return_dict_in_generate=True
    )
    response = out.sequences[0, len(prompt) :].tolist()
    opening = kind.tokenizer.convert_tokens_to_ids(TOKENIZER.convert_ids_to_tokens(prompt))
    expected = float(kind.reward(opening, response, kind.table[response]))
    assert float(out.rewards[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_those_of_float64_but_for_rounding(dtype: torch.dtype) -> None:
    response = torch.tensor(ids("at 12\n24\n36 it"))

    def evaluated(precision: torch.dtype) -> Any:
        process = nf.ProcessReward(tiny_process_model("qwen3", dtype=precision), "\n", "mean")
        language_model = LanguageModel(tiny_language_model("llama", dtype=precision), TOKENIZER)
        objective = Objective(language_model, ProcessRewardModel(process, None, language_model, TOKENIZER), CONFIG)
        return objective.evaluate([Request(new_sequence(objective), response, 2)])[0]

    exact, rounded = evaluated(torch.float64), evaluated(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert rounded.reward == pytest.approx(exact.reward, abs=tolerance)
    apart = (rounded.factors[2].double() - exact.factors[2]).norm() / exact.factors[2].norm()
    assert apart < (1e-4 if dtype == torch.float32 else 0.2)


def test_an_ordinary_token_can_be_inserted() -> None:
    kind = Kind(nf.ProcessReward(tiny_process_model(), "+", "mean", "."), TOKENIZER, ".", True)
    objective = objective_of(kind)
    response = ids("at 12. it is 24")
    conversation = objective.reward_model.conversation(new_sequence(objective).frame, torch.tensor(response))
    assert TOKENIZER.decode(conversation.ids).endswith("at 12.+ it is 24+")
    (reward,) = objective.rewards([new_sequence(objective)], [torch.tensor(response)])
    expected = kind.reward(prompt_ids(TOKENIZER), response, kind.table[response])
    assert reward == pytest.approx(float(expected), abs=1e-12)


def test_an_adapter_around_a_token_classifier_is_read_with_its_changes() -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="TOKEN_CLS", init_lora_weights=False)
    model = get_peft_model(tiny_process_model("qwen3"), settings).double().eval()
    kind = Kind(nf.ProcessReward(model, "\n", "mean"), TOKENIZER, "\n", False)
    objective = objective_of(kind)
    response = ids("at 12\n24\nit")
    (reward,) = objective.rewards([new_sequence(objective)], [torch.tensor(response)])
    with torch.no_grad():
        expected = float(kind.reward(prompt_ids(TOKENIZER), response, kind.table[response]))
        with model.disable_adapter():
            without = float(kind.reward(prompt_ids(TOKENIZER), response, kind.table[response]))
    assert reward == pytest.approx(expected, abs=1e-9)
    assert abs(expected - without) > 1e-3


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


# From disk


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(model: Any, tokenizer: Any, **config: Any) -> Path:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return tmp_path / "model"

    return save


def test_a_token_classifier_is_loaded_with_its_separator(saved: Callable[..., Path]) -> None:
    model = tiny_process_model(dtype=torch.float32)
    folder = saved(model, TOKENIZER)
    process, tokenizer = load_reward_model(folder, device="cpu", step_separator="\n", step_aggregation="last")
    assert (process.separator, process.aggregation) == ("\n", "last")
    probe = torch.tensor([ids("at 12\n")])
    torch.testing.assert_close(process.model(input_ids=probe).logits, model(input_ids=probe).logits)
    out = nf.generate(tiny_language_model("llama", dtype=torch.float32), TOKENIZER, process, tokenizer, "it", DECODE)
    assert 0 <= out.rewards[0] <= 1
    inserted, _ = load_reward_model(folder, device="cpu", step_separator="+", step_insert_after=".")
    assert inserted.insert_after == "."
    with pytest.raises(ValueError, match=r"path is .*, a token classifier, and where it is to be read it does not say"):
        load_reward_model(folder, device="cpu")


def test_a_head_of_two_layers_is_loaded_as_qwen_stores_it(saved: Callable[..., Path]) -> None:
    model = tiny_process_model("qwen3", two_layers=True, dtype=torch.float32, vocab_rows=len(MARKED))
    own = {"architectures": ["Qwen3ForProcessRewardModel"], "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2"}}
    process, tokenizer = load_reward_model(saved(model, MARKED, **own), device="cpu")
    assert (process.separator, process.aggregation) == (MARK, "min")
    probe = torch.tensor([MARKED("at 12\n")["input_ids"]])
    torch.testing.assert_close(process.model(input_ids=probe).logits, model(input_ids=probe).logits)
    wrapped = ProcessRewardModel(
        process, tokenizer, LanguageModel(shared_language_model("llama"), TOKENIZER), TOKENIZER
    )
    assert wrapped.inserts
    assert wrapped.backbone is not None


def test_a_value_head_is_loaded_as_skywork_stores_it(saved: Callable[..., Path]) -> None:
    model = tiny_language_model("qwen3", dtype=torch.float32, tied=False)
    folder = saved(model, TOKENIZER)
    torch.manual_seed(0)
    head = {"v_head.summary.weight": torch.randn(1, 24), "v_head.summary.bias": torch.randn(1)}
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors", {"format": "pt"})
    process, tokenizer = load_reward_model(folder, device="cpu")
    assert process.separator == "\n"
    probe = torch.tensor([ids("at 12\n")])
    hidden = model.model(input_ids=probe).last_hidden_state
    expected = hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
    torch.testing.assert_close(process.model(input_ids=probe).logits, expected)
    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)
    wrapped = ProcessRewardModel(process, tokenizer, language_model, TOKENIZER)
    frame = wrapped.chat_frame(MESSAGES)
    conversation = wrapped.conversation(frame, torch.tensor(ids("at 12\nit is")))
    # As these models were trained: the problem, a line break, and a line break behind each step.
    assert tokenizer.decode(conversation.ids) == f"{MESSAGES[0]['content']}\nat 12\nit is\n"
    (reward,), _ = wrapped.rewards([conversation])
    values = model.model(input_ids=conversation.ids.unsqueeze(0)).last_hidden_state[0] @ head["v_head.summary.weight"].T
    line_breaks = (conversation.ids == ids("\n")[0]).nonzero().flatten()[1:]
    scores = (values + head["v_head.summary.bias"]).sigmoid()[line_breaks]
    assert len(scores) == 2
    assert float(reward) == pytest.approx(float(scores.min()), rel=1e-5)


# What is refused


def test_what_cannot_be_read_is_refused_in_one_sentence(saved: Callable[..., Path]) -> None:
    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)

    def wrap(model: Any, separator: str = "\n", **more: Any) -> ProcessRewardModel:
        return ProcessRewardModel(nf.ProcessReward(model, separator, **more), None, language_model, TOKENIZER)

    model = tiny_process_model()
    with pytest.raises(ValueError, match=r"aggregation is 'max'; use one of min, product, last, mean"):
        nf.ProcessReward(model, "\n", "max")
    with pytest.raises(ValueError, match=r"separator is ''; give the text that ends a step"):
        nf.ProcessReward(model, "")
    with pytest.raises(ValueError, match=r"separator is 'Ж', which reward_tokenizer has no token for"):
        wrap(model, "Ж")
    with pytest.raises(ValueError, match=r"separator is 'the user', .* tokens of reward_tokenizer, and is to be"):
        wrap(model, "the user", insert_after="\n")
    with pytest.raises(ValueError, match=r"label is 2, and reward_model .* has 2 labels; give 0 to 1"):
        wrap(model, label=2)
    with pytest.raises(ValueError, match=r"has 3 labels \('LABEL_0', 'LABEL_1', 'LABEL_2'\), and which of them means"):
        wrap(tiny_process_model(labels=3))
    named = tiny_process_model()
    named.config.id2label = {0: "correct", 1: "wrong"}
    assert wrap(named)._label == 0
    named.config.id2label = {0: "B", 1: "I"}
    with pytest.raises(ValueError, match=r"has 2 labels \('B', 'I'\), and which of them means a right step"):
        wrap(named)
    assert wrap(named, label=0)._label == 0
    with pytest.raises(ValueError, match=r"is in training mode; call .eval\(\) on it first"):
        wrap(tiny_process_model().train())
    with pytest.raises(ValueError, match=r"given without ProcessReward"):
        wrap(tiny_reward_model("llama"))
    with pytest.raises(TypeError, match=r"ProcessReward takes a transformers model with logits .* got a str"):
        wrap("a/path")
    folder = saved(tiny_reward_model("llama", dtype=torch.float32), TOKENIZER)
    with pytest.raises(ValueError, match=r"step_separator is '\\n', and path is .*, which is no process reward model"):
        load_reward_model(folder, device="cpu", step_separator="\n")
    with pytest.raises(ValueError, match=r"step_aggregation is 'best'; use one of min, product, last, mean"):
        load_reward_model(folder, device="cpu", step_aggregation="best")


def test_an_adapter_of_a_token_classifier_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "TOKEN_CLS"}))
    with pytest.raises(ValueError, match=r"path is .*, a peft adapter of a token classifier; merge it into its base"):
        load_reward_model(tmp_path, device="cpu", step_separator="\n")


def test_a_gradient_that_is_cut_off_is_refused() -> None:
    model = tiny_process_model()
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: own(hidden.detach(), *args, **kwargs)
    with pytest.raises(ValueError, match=r"^reward_model .* cannot be used: it gives no gradient"):
        objective_of(Kind(nf.ProcessReward(model, "\n"), TOKENIZER, "\n", False))


def test_a_checkpoint_without_its_head_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved(
        tiny_language_model("qwen3", dtype=torch.float32), MARKED, architectures=["Qwen3ForProcessRewardModel"]
    )
    with pytest.raises(ValueError, match=r"path is .*, a process reward model without weights for score"):
        load_reward_model(folder, device="cpu")
