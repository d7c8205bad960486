"""Process reward models from disk, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_kinds import MARK, MARKED, TOKENIZER, Kind, ids, objective_of
from safetensors.torch import load_file, save_file

import nabla_fast as nf
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.loading import load_reward_model
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.testing.models import (
    MESSAGES,
    shared_language_model,
    tiny_language_model,
    tiny_process_model,
    tiny_reward_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = nf.NablaConfig(max_new_tokens=6, max_rollouts=2, max_iters=2, gradient_threshold=None)


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
    process, tokenizer = load_reward_model(
        folder, device="cpu", dtype="float32", step_separator="\n", step_aggregation="last"
    )
    assert (process.separator, process.aggregation) == ("\n", "last")
    probe = torch.tensor([ids("at 12\n")])
    torch.testing.assert_close(process.model(input_ids=probe).logits, model(input_ids=probe).logits)
    out = nf.generate(tiny_language_model("llama", dtype=torch.float32), TOKENIZER, process, tokenizer, "it", SHORT)
    assert 0 <= out.rewards[0] <= 1
    inserted, _ = load_reward_model(folder, device="cpu", dtype="float32", step_separator="+", step_insert_after=".")
    assert inserted.insert_after == "."
    with pytest.raises(ValueError, match=r"path is .*, a token classifier, and where it is to be read it does not say"):
        load_reward_model(folder, device="cpu")


def test_a_head_of_two_layers_is_loaded_as_qwen_stores_it(saved: Callable[..., Path]) -> None:
    model = tiny_process_model("qwen3", two_layers=True, dtype=torch.float32, vocab_rows=len(MARKED))
    own = {"architectures": ["Qwen3ForProcessRewardModel"], "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2"}}
    process, tokenizer = load_reward_model(saved(model, MARKED, **own), device="cpu", dtype="float32")
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
    process, tokenizer = load_reward_model(folder, device="cpu", dtype="float32")
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
    with pytest.raises(ValueError, match=r"has no weights for score.*; give a trained process reward model"):
        load_reward_model(folder, device="cpu")
