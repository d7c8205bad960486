"""Adapters of peft: loaded by path and by name, several in one model, and beside quantised layers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import nabla_fast as nf
from nabla_fast.models import adapters, checkpoint
from nabla_fast.models.loading import load_language_model, load_reward_model
from nabla_fast.testing.models import save_pair, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[5, 9, 13, 21, 34]])
CONFIG = nf.NablaConfig(
    max_new_tokens=8,
    max_rollouts=3,
    max_iters=3,
    learning_rate=0.3,
    confidence_threshold=None,
    gradient_threshold=None,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
)
NAMES = ("one", "other")
TARGETS = ["q_proj", "down_proj"]


def lora(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(task_type=task, r=4, target_modules=TARGETS, init_lora_weights=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair of models; `several` holds two adapters of the language model by name, `reward` one of a classifier."""
    root = tmp_path_factory.mktemp("models")
    language, reward = save_pair(root, reward_family="llama")
    model: Any = AutoModelForCausalLM.from_pretrained(language)
    torch.manual_seed(0)
    model = get_peft_model(model, lora(), adapter_name=NAMES[0])
    torch.manual_seed(1)
    model.add_adapter(NAMES[1], lora())
    model.save_pretrained(root / "several")
    head = AutoModelForSequenceClassification.from_pretrained(language, num_labels=1)
    torch.manual_seed(2)
    get_peft_model(head, lora("SEQ_CLS")).save_pretrained(root / "reward_adapter")
    return {
        "language": language,
        "reward": reward,
        "several": root / "several",
        "reward adapter": root / "reward_adapter",
        **{name: root / "several" / name for name in NAMES},
    }


def with_adapters(folders: dict[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folders["language"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folders["one"], adapter_name="one")
    model.load_adapter(folders["other"], adapter_name="other")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def decode(model: Any, folders: dict[str, Path], reward: Any = None, **changes: Any) -> list[int]:
    reward = load_reward_model(folders["reward"], device="cpu", dtype="float32")[0] if reward is None else reward
    out = nf.generate(model, TOKENIZER, reward, TOKENIZER, "what is 3 times 4", CONFIG.replace(**changes))
    return list(out.sequences[0].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_that_is_an_adapter(name: str, folders: dict[str, Path]) -> None:
    expected = with_adapters(folders)
    expected.set_adapter(name)
    for path, chosen in ((folders[name], None), (folders["several"], name)):
        model, tokenizer = load_language_model(path, device="cpu", dtype="float32", adapter=chosen)
        assert isinstance(model, LlamaForCausalLM)
        assert not any("lora" in key or weight.requires_grad for key, weight in model.named_parameters())
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
        assert tokenizer("the")["input_ids"] == TOKENIZER("the")["input_ids"]
    half, _ = load_language_model(folders[name], device="cpu", dtype="bfloat16")
    assert all(torch.equal(half.state_dict()[key], x.bfloat16()) for key, x in model.state_dict().items())


def test_the_base_can_be_given(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads((folders["one"] / file.name).read_text()) | {"base_model_name_or_path": None})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes((folders["one"] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not name a base model"):
        load_language_model(tmp_path, device="cpu", dtype="float32")
    given, _ = load_language_model(tmp_path, device="cpu", dtype="float32", base=folders["language"])
    assert torch.equal(logits(given), logits(load_language_model(folders["one"], device="cpu", dtype="float32")[0]))


def test_a_reward_adapter_is_chosen_by_name(folders: dict[str, Path]) -> None:
    root, name = folders["reward adapter"].parent, folders["reward adapter"].name
    chosen, _ = load_reward_model(root, device="cpu", dtype="float32", adapter=name)
    assert torch.equal(logits(chosen), logits(load_reward_model(root / name, device="cpu", dtype="float32")[0]))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("several", {}, r"path is .*several, which holds adapters in sub-folders; give one of one, other as adapter"),
        (
            "several",
            {"adapter": "new"},
            r"adapter is 'new', and path is .*, which has no new/adapter_config.json; it has one, o",
        ),
        ("one", {"adapter": "new"}, r"adapter is 'new', and path is .*; it has no adapters in sub-folders"),
        (
            "language",
            {"adapter": "one"},
            r"adapter is 'one', and path is .*language_model, which has no one/adapter_config",
        ),
        (
            "reward adapter",
            {},
            r"path is .*reward_adapter, a peft adapter for SEQ_CLS; give one for CAUSAL_LM, a language m",
        ),
    ],
)
def test_refusals_name_what_is_there(path: str, options: Any, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load_language_model(folders[path], device="cpu", dtype="float32", **options)


def test_an_adapter_that_changes_the_input_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["language"])
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a peft adapter of type PROMPT_TUNING, which changes what a model reads"):
        load_language_model(tmp_path, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", [None, "one"])
def test_adapters_on_the_hub(name: str | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub has is looked for by name, and its files are fetched once it is an adapter."""
    asked: list[Any] = []
    root = folders["one"] if name is None else folders["several"]

    def cached_file(source: str, file: str, subfolder: str = "", **_: Any) -> str | None:
        asked.append((source, file, subfolder))
        found = root / subfolder / file
        return str(found) if found.is_file() else None

    def fetched(source: str, allow_patterns: list[str]) -> str:
        assert f"{name}/adapter_*" in allow_patterns if name else "adapter_*" in allow_patterns
        asked.append(source)
        return str(root)

    class Hub:
        def model_info(self, name: str, timeout: float) -> None:
            return None

    expected = logits(load_language_model(folders["one"], device="cpu", dtype="float32")[0])
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda source: ["one/adapter_config.json", "README.md"])
    model, _ = load_language_model("some/adapter", device="cpu", dtype="float32", adapter=name)
    assert asked == [("some/adapter", "adapter_config.json", name or ""), "some/adapter"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"adapter is 'new', and path is some/adapter, which has no .*; it has one"):
        load_language_model("some/adapter", device="cpu", dtype="float32", adapter="new")


def test_a_cached_adapter_is_found_without_the_hub(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(folders["one"] / file) if (folders["one"] / file).is_file() else None,
    )
    assert checkpoint.cached_snapshot("some/adapter") == folders["one"]
    assert adapters.find_adapter(str(folders["one"]), None, "path") == str(folders["one"])


def test_the_active_adapter_counts_in_every_call(folders: dict[str, Path]) -> None:
    """Chosen, chosen anew, switched off for a block, and weighed: nothing of an earlier call is used again."""
    model, reward = with_adapters(folders), load_reward_model(folders["reward"], device="cpu", dtype="float32")[0]
    expected = {}
    for name in NAMES:
        expected[name] = decode(load_language_model(folders[name], device="cpu", dtype="float32")[0], folders, reward)
    expected["none"] = decode(
        load_language_model(folders["language"], device="cpu", dtype="float32")[0], folders, reward
    )
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    for name in (*NAMES, *NAMES):
        model.set_adapter(name)
        assert decode(model, folders, reward) == expected[name]
        with model.disable_adapter():
            assert decode(model, folders, reward) == expected["none"]
        assert decode(model, folders, reward) == expected[name]


def test_adapters_inside_a_model_are_those_that_are_active(folders: dict[str, Path]) -> None:
    """As transformers' own `load_adapter` puts them there."""
    model = AutoModelForCausalLM.from_pretrained(folders["language"], dtype=torch.float32)
    reward = load_reward_model(folders["reward"], device="cpu", dtype="float32")[0]
    plain = decode(model.eval(), folders, reward)
    torch.manual_seed(0)
    model = inject_adapter_in_model(lora(), model, adapter_name="one").eval()
    changed = decode(model, folders, reward)
    assert changed != plain
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for on in (False, True):
        for layer in layers:
            layer.enable_adapters(on)
        assert decode(model, folders, reward) == (changed if on else plain)


def test_a_reward_whose_adapter_is_switched_off(folders: dict[str, Path]) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folders["reward"], dtype=torch.float32)
    torch.manual_seed(0)
    reward = get_peft_model(base, lora("SEQ_CLS")).eval()
    language, _ = load_language_model(folders["language"], device="cpu", dtype="float32")

    def scored() -> float:
        return nf.generate(language, TOKENIZER, reward, TOKENIZER, "is it", CONFIG.replace(max_rollouts=1)).rewards[0]

    first = scored()
    with reward.disable_adapter():
        without = scored()
        assert scored() == without
    assert abs(first - without) > 1e-3
    assert scored() == first


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["bnb-8bit", "bnb-4bit"])
def test_beside_a_quantised_base_an_adapter_is_not_merged(quantization: str, folders: dict[str, Path]) -> None:
    language, _ = load_language_model(
        folders["several"], device="cpu", dtype="float32", adapter="one", quantization=quantization
    )
    reward, _ = load_reward_model(folders["reward adapter"], device="cpu", dtype="float32", quantization=quantization)
    assert isinstance(language, PeftModel)
    assert isinstance(reward, PeftModel)
    assert not language.training
    with_it = decode(language, folders, reward)
    assert decode(language, folders, reward) == with_it
    with language.disable_adapter():
        base, _ = load_language_model(folders["language"], device="cpu", dtype="float32", quantization=quantization)
        assert decode(language, folders, reward) == decode(base, folders, reward)
