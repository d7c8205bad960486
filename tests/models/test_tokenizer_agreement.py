"""Whether two tokenizers with the same vocabulary cut text alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.vocabulary import align, require_same_tokenization
from nabla_fast.testing.models import CHAT_TEMPLATE, shared_language_model, tiny_reward_model, tiny_tokenizer

WORDS = ("<|pad|>", "<|unk|>", "<|end|>", *"0123456789", " + ", " - ", " * ", " = ", "\n", "Compute ", ".")


def word_tokenizer() -> Any:
    """Whole words with the spaces around them, which no family's own rules leave together."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" [-+*=] |Compute |\n|."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>"
    )


def digit_tokenizer() -> Any:
    """`tiny_tokenizer`, but "12" and other numbers it has tokens for stay apart."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    return tokenizer


def with_bos(tokenizer: Any) -> Any:
    bos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)]
    )
    assert tokenizer("1")["input_ids"][0] == tokenizer.eos_token_id
    return tokenizer


def saved(tokenizer: Any, config: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def compare(tokenizer: Any, reward_tokenizer: Any) -> None:
    alignment = align(tokenizer, reward_tokenizer, len(tokenizer), len(reward_tokenizer))
    require_same_tokenization(tokenizer, reward_tokenizer, alignment)


@pytest.mark.parametrize(
    ("tokenizer", "reward_tokenizer"),
    [
        (tiny_tokenizer(), tiny_tokenizer()),
        (tiny_tokenizer(), tiny_tokenizer(shuffle=5)),
        (tiny_tokenizer(), with_bos(tiny_tokenizer())),
        (with_bos(word_tokenizer()), word_tokenizer()),
    ],
    ids=["same", "other order", "reward BOS", "own BOS"],
)
def test_equal_cuts_are_silent(tokenizer: Any, reward_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(tokenizer, reward_tokenizer)


def test_a_pre_tokenizer_that_loading_replaced_is_an_error_on_either_side(tmp_path: Path) -> None:
    own = word_tokenizer()
    replaced = AutoTokenizer.from_pretrained(saved(own, Qwen2Config(vocab_size=len(own)), tmp_path))
    assert replaced.get_vocab() == own.get_vocab()
    prompt = "Compute 12 + 7."
    assert replaced(prompt)["input_ids"] != own(prompt)["input_ids"], "transformers keeps the pre-tokenizer now"
    # The piece is one that the vocabulary can write, not one that nobody can read.
    word = "'( . |.n|Compute )'"
    with pytest.raises(ValueError, match=rf"of {word} tokenizer makes '\1' and reward_tokenizer nothing \("):
        compare(own, replaced)
    with pytest.raises(ValueError, match=rf"of {word} tokenizer makes nothing and reward_tokenizer '\1' \("):
        compare(replaced, own)


def test_what_the_error_advises_helps(tmp_path: Path) -> None:
    own = word_tokenizer()
    folder = saved(own, Qwen2Config(vocab_size=len(own)), tmp_path / "qwen2")
    other = saved(own, LlamaConfig(vocab_size=len(own)), tmp_path / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(own, PreTrainedTokenizerFast.from_pretrained(folder))
        compare(own, AutoTokenizer.from_pretrained(other))


def test_unknown_tokens_where_the_other_reads_the_text_are_a_difference() -> None:
    blind = word_tokenizer()
    blind.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match=r"reward_tokenizer '<\|unk\|>'"):
        compare(word_tokenizer(), blind)


@pytest.mark.parametrize("shuffle", [None, 5])
def test_a_small_difference_is_a_warning_with_both_cuts_of_the_shortest_piece(shuffle: int | None) -> None:
    with pytest.warns(
        UserWarning, match=r"of '(\d)(\d)' tokenizer makes '\1\2' and reward_tokenizer '\1' '\2' \(9"
    ) as w:
        compare(tiny_tokenizer(shuffle=shuffle), digit_tokenizer())
    assert len(w) == 1


def test_texts_with_a_token_that_one_side_lacks_are_left_to_the_alignment() -> None:
    less = tiny_tokenizer(missing=("ans", "12"))
    with pytest.warns(UserWarning, match="have no partner") as caught:
        compare(tiny_tokenizer(), less)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(less, tiny_tokenizer())


def test_a_reward_model_is_compared_when_it_is_made() -> None:
    tokenizer = tiny_tokenizer()
    language_model = LanguageModel(shared_language_model("llama"), tokenizer)
    model = tiny_reward_model("llama")
    other = digit_tokenizer()
    other.chat_template = CHAT_TEMPLATE
    with pytest.warns(UserWarning, match="cut text differently"):
        RewardModel(model, other, language_model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardModel(model, tiny_tokenizer(), language_model, tokenizer)
