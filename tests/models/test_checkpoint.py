"""nabla_fast.models.checkpoint: damaged, incomplete and hostile models are refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nabla_fast.models import checkpoint, loading
from nabla_fast.testing.models import save_pair

WEIGHTS = "model.safetensors"


class Hostile:
    """Makes the file ``evidence`` in the working directory where its pickle is loaded with code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("evidence",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    language_model, reward_model = save_pair(tmp_path_factory.mktemp("pair"))
    return Path(language_model), Path(reward_model)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def random_bytes(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 8)


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}" * 100)


def hostile_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Hostile()}))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def missing_shard(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[0]: "model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "mlp" in name)
    save_file({key: value for key, value in weights.items() if key != name}, folder / WEIGHTS, {"format": "pt"})


def writes(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def changes(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def removes(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)] and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors is no complete safetensors file"),
        (random_bytes, "model.safetensors is no complete safetensors file"),
        (huge_header, "model.safetensors is no complete safetensors file"),
        (writes(WEIGHTS, ""), "model.safetensors is no complete safetensors file"),
        (hostile_pickle, "pytorch_model.bin is damaged, or a pickle that would run code"),
        (no_weights, "it has no weights"),
        (missing_shard, "model.safetensors.index.json names model-00002-of-00002.safetensors, which is not there"),
        (missing_tensor, "has no weights for .*mlp"),
        (writes("config.json", '{"model_type": '), "config.json is not JSON"),
        (writes("config.json", "[1]"), "config.json must hold a JSON object"),
        (removes("config.json"), "it has no config.json"),
        (changes(num_hidden_layers=10**9, layer_types=None), "asks for 1000000000 layers; 10000 are accepted"),
        (changes(intermediate_size=40), "config.json and its weights are of different sizes"),
        (changes(model_type="unheard-of", auto_map={"AutoConfig": "x.Y"}), "code of its own, which is not run here"),
        (writes("tokenizer.json", '{"x"'), "tokenizer.json is not JSON"),
        (writes("tokenizer.json", "{}"), "cannot be loaded"),
        (writes("tokenizer_config.json", "[]"), "tokenizer_config.json must hold a JSON object"),
        (removes("tokenizer*"), "cannot be loaded: .*(tokenizer|vocabulary)"),
    ],
)
@pytest.mark.parametrize("kind", ["language model", "reward model"])
def test_a_damaged_folder_is_one_sentence_with_the_file(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source, load = (
        (pair[0], loading.load_language_model) if kind == "language model" else (pair[1], loading.load_reward_model)
    )
    folder = tmp_path / "m[/b]"
    shutil.copytree(source, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        load(folder, device="cpu", argument="--model")
    assert str(refused.value).startswith(f"--model is {folder}, which ")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "evidence").exists()


def test_plain_tensors_in_a_pickle_are_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pair[0], folder)
    weights = load_file(folder / WEIGHTS)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    model, _ = loading.load_language_model(folder, device="cpu", dtype="float32")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as a GGUF file does"),
        (b"random bytes, and enough of them", "does not begin as a GGUF file does"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"x" * 100, f"promises {2**60} tensors and {2**60} values"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 2, 2**63) + b"x" * 100, "cannot be loaded"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 1, 2, 1, b"a", 9, 4, 2**40) + b"x" * 100, "cannot be loaded"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "cannot be loaded"),
    ],
)
def test_a_gguf_file_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setenv("NABLA_FAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        loading.load_language_model(file)
    assert str(refused.value).startswith(f"path is {file}, which cannot be loaded: ")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(pair[0], num_labels=1)
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=2, target_modules="all-linear")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_a_hostile_pickle(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is damaged, or a pickle that would run code"):
        loading.load_reward_model(adapter, device="cpu", dtype="float32")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("name", ["score.weight", "lora_A.weight"])
def test_an_adapter_that_lacks_a_tensor(adapter: Path, name: str) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    gone = next(key for key in weights if key.endswith(name))
    save_file({key: value for key, value in weights.items() if key != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"path is .*adapter.*{name.split('.')[0]}"):
        loading.load_reward_model(adapter, device="cpu", dtype="float32")


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter_config\.json does not name a base model"):
        loading.load_reward_model(adapter, device="cpu", dtype="float32")


class Hub:
    """Stands for the hub's API: counts how often it is asked, and does not answer."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def model_info(self, name: str, timeout: float) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ConnectionError("no route"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr(checkpoint, "cached_snapshot", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--model is hub-typo; there is no such folder here, and the Hugging F"):
        loading.load_language_model("hub-typo", argument="--model")
    assert hub.asked == 1


def test_without_the_hub_the_cached_copy_is_loaded(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    hub = Hub(ConnectionError("no route"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr(checkpoint, "cached_snapshot", lambda name: pair[0])
    model, _ = loading.load_language_model("some/model", device="cpu", dtype="float32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_the_hub_has_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(None))
    assert checkpoint.hub_source("some/model", "path") == "some/model"
