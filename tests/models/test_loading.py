"""nabla_fast.models.loading: folders, adapters, GGUF copies and the errors users meet."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nabla_fast.models import gguf, loading, pretrained

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
IDS = torch.tensor([[1, 5, 3, 7]])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(ord("a") + i): i + 3 for i in range(13)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "language_model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reward_folder(folder: Path, labels: int) -> Path:
    torch.manual_seed(1)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=labels)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter_folder(base: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter over ``base`` with nothing at zero, and the scores that base and adapter give together."""
    from peft import LoraConfig, TaskType, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules="all-linear")
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return folder, adapted(IDS).logits.detach()


def test_language_model_from_folder(language_model: Path) -> None:
    model, tokenizer = loading.load_language_model(language_model, device="cpu", dtype="float32")
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer("a b")["input_ids"] == [3, 4]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(language_model: Path, dtype: str | torch.dtype) -> None:
    model, _ = loading.load_language_model(str(language_model), device="cpu", dtype=dtype)
    assert model.dtype == torch.bfloat16


def test_reward_model_from_folder(tmp_path: Path) -> None:
    model, _ = loading.load_reward_model(
        reward_folder(tmp_path / "reward", 1), device="cpu", attn_implementation="eager"
    )
    assert model.config.num_labels == 1
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert model(IDS).logits.shape == (1, 1)


def test_adapter_is_merged(language_model: Path, tmp_path: Path) -> None:
    folder, expected = adapter_folder(language_model, tmp_path / "adapter")
    model, tokenizer = loading.load_reward_model(folder, device="cpu", dtype="float32")
    assert isinstance(model, LlamaForSequenceClassification)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert tokenizer("a b")["input_ids"] == [3, 4]


def test_adapter_with_the_base_given(language_model: Path, tmp_path: Path) -> None:
    folder, expected = adapter_folder(language_model, tmp_path / "adapter")
    moved = language_model.rename(tmp_path / "moved")
    model, _ = loading.load_reward_model(folder, device="cpu", dtype="float32", base=moved)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"the adapter's base model is .*language_model"):
        loading.load_reward_model(folder, device="cpu", dtype="float32")


def test_family_without_sdpa_gets_eager(tmp_path: Path) -> None:
    from transformers import Gemma2ForCausalLM

    folder = tmp_path / "gemma2"
    Gemma2ForCausalLM(Gemma2Config(**SIZES)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model, _ = loading.load_language_model(folder, device="cpu", dtype="float32")
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        ("cuda", torch.bfloat16, True, "flash_attention_2"),
        ("cuda", torch.float16, True, "flash_attention_2"),
        ("cuda", torch.bfloat16, False, "sdpa"),
        ("cuda", torch.float32, True, "sdpa"),
        ("cpu", torch.bfloat16, True, "sdpa"),
    ],
)
def test_attention_auto(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, installed: bool, expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert loading.choose_attention("auto", torch.device(device), dtype) == expected


def test_automatic_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.choose_device("auto") == torch.device("cuda")
    assert loading.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert loading.choose_dtype("auto", torch.device("mps")) == torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(pretrained, "multiplies_bfloat16", lambda native=native: native)
        assert loading.choose_dtype("auto", torch.device("cpu")) == expected
        assert loading.choose_dtype("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such", "~/no/such", "no/such/model", "no-such.gguf"])
def test_missing_path(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"path is {path}, and there is no such file or folder"):
        loading.load_language_model(path)


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.bin; give a \.gguf file, a model folder or a hub id"):
        loading.load_language_model(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, 'device is \'abacus\'.*use "auto", "cpu"'),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch sees"),
        ({"dtype": "int8"}, "dtype is 'int8'; use \"auto\" or one of bfloat16"),
        ({"dtype": torch.int32}, r"dtype is torch\.int32"),
        ({"attn_implementation": "flash"}, "attn_implementation is 'flash'; use one of auto"),
    ],
)
def test_unknown_arguments(language_model: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loading.load_language_model(language_model, **arguments)  # type: ignore[arg-type]


def test_reward_model_with_several_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a classifier with 3 labels; a reward model has exactly one"):
        loading.load_reward_model(reward_folder(tmp_path / "reward", 3), device="cpu", dtype="float32")


def test_language_model_is_no_reward_model(language_model: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights for score\.weight"):
        loading.load_reward_model(language_model, device="cpu", dtype="float32")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NABLA_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert gguf.cache_directory() == tmp_path / "shared" / "nabla_fast"
    monkeypatch.setenv("NABLA_FAST_CACHE", str(tmp_path / "own"))
    assert gguf.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("NABLA_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_directory() == Path.home() / ".cache" / "nabla_fast"


@pytest.fixture
def fake_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A file that stands for a GGUF, and the list of conversions made from it."""
    monkeypatch.setenv("NABLA_FAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    made: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        made.append(target)
        target.mkdir()
        (target / "copy_of").write_bytes(source.read_bytes())

    monkeypatch.setattr(gguf, "_convert_gguf", convert)
    return file, made


def test_gguf_is_converted_once(fake_gguf: tuple[Path, list[Path]]) -> None:
    file, made = fake_gguf
    first = gguf.converted_gguf(file)
    assert gguf.converted_gguf(file) == first
    assert len(made) == 1
    assert (first / "copy_of").read_bytes() == b"weights"
    assert [entry.name for entry in gguf.cache_directory().iterdir()] == [first.name]


def test_gguf_copy_follows_path_size_and_time(fake_gguf: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file, made = fake_gguf
    copies = {gguf.converted_gguf(file)}
    os.utime(file, ns=(1, 1))
    copies.add(gguf.converted_gguf(file))
    file.write_bytes(b"other weights")
    os.utime(file, ns=(1, 1))
    copies.add(gguf.converted_gguf(file))
    copies.add(gguf.converted_gguf(file.rename(tmp_path / "elsewhere.gguf")))
    assert len(copies) == len(made) == 4


def test_gguf_conversion_that_fails_leaves_nothing(
    fake_gguf: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = fake_gguf

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert_gguf", convert)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted_gguf(file)
    assert list(gguf.cache_directory().iterdir()) == []


def test_gguf_concurrent_conversion(fake_gguf: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = fake_gguf
    convert = gguf._convert_gguf
    quicker: list[Path] = []

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(gguf, "_convert_gguf", convert)
        quicker.append(gguf.converted_gguf(source))
        convert(source, target)

    monkeypatch.setattr(gguf, "_convert_gguf", overtaken)
    assert gguf.converted_gguf(file) == quicker[0]
    assert len(list(gguf.cache_directory().iterdir())) == 1


def test_gguf_without_its_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NABLA_FAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'gguf and accelerate; run pip install "nabla_fast\[gguf\]"'):
        loading.load_language_model(file)


@pytest.mark.slow
def test_real_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from nabla_fast.demo import smollm2_path

    try:
        file = smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("NABLA_FAST_CACHE", str(tmp_path / "cache"))
    model, tokenizer = loading.load_language_model(file, device="cpu", dtype="float32")
    assert capfd.readouterr().err == ""
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "quantization_config" not in model.config.to_dict()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
