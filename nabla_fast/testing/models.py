"""Tiny random models and tokenizers of every family, for tests that want exact numbers in well under a second.

The models are two layers deep and 24 wide. In float64 they compute in float64 throughout, where transformers computes
norms and eager softmax in float32 whatever the dtype; rotary tables alone stay float32, and they are the same on every
path. The weights are drawn large enough that softmaxes are far from uniform and a few optimizer steps change tokens.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.masking_utils import eager_mask

from nabla_fast.models.loading import two_layer_classifier

DEVICE = torch.device(os.environ.get("NABLA_FAST_TEST_DEVICE") or "cpu")
"""Where the models are; benchmarks/gpu.sh has whole decodes tested on its GPU."""
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt2")
WIDTH = 24
CONTEXT = 128
MESSAGES = ({"role": "user", "content": "what is 3 times 4"},)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CLOSING = "<|end|>\n"
"""What `CHAT_TEMPLATE` writes after a response."""

SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|start|>", "<|end|>")
_CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789 \n+=.?")
# Every entry is its first characters, themselves an entry, and one more character: one merge each.
_MERGED = (
    *("th", "the", "he", "in", "er", "an", "ans", "on", "re", "at", "is", "us", "use", "user", "as", "ass", "ti"),
    *("tim", "ist", "nt", "es", "ed", "or", "to", "it", "ou", "wh", "wha", "what", "12", "24", "10", "36", "48", " i"),
    *(" t", " a", "= ", "+ "),
)
_MODEL_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", "Phi3ForSequenceClassification"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
}


def tiny_tokenizer(
    *, shuffle: int | None = None, missing: Sequence[str] = (), chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A character-level BPE tokenizer of about 85 tokens; lower-case text, digits and the chat template round-trip.

    Args:
        shuffle: puts the ids in another order, the same for the same number.
        missing: merged tokens (such as "ans") to leave out; their text is then cut into smaller pieces.
        chat_template: None leaves the tokenizer without one.
    """
    unknown = set(missing) - set(_MERGED)
    if unknown:
        raise ValueError(f"missing must be among the merged tokens, got {sorted(unknown)}")
    merged = [token for token in _MERGED if token not in missing]
    tokens = [*SPECIAL_TOKENS, *_CHARACTERS, *merged]
    if shuffle is not None:
        random.Random(shuffle).shuffle(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(token[:-1], token[-1]) for token in merged if token[:-1] in vocabulary]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<|unk|>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_language_model(
    family: str,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    vocab_rows: int | None = None,
) -> Any:
    """A causal language model in ``eval()`` for `tiny_tokenizer`.

    Args:
        family: one of `FAMILIES`.
        tied: whether the output head is the input embedding.
        dtype: of weights and of all arithmetic.
        seed: of the weights.
        vocab_rows: rows of head and embedding; None is the tokenizer's size, more is a padded vocabulary.
    """
    config_class, model_class, _ = _MODEL_CLASSES[family]
    config = _config(family, config_class, tied=tied, vocab_rows=vocab_rows)
    model = _build(getattr(transformers, model_class), config, dtype, seed)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    return model


def tiny_reward_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    vocab_rows: int | None = None,
    labels: int = 1,
) -> Any:
    """A sequence classifier in ``eval()`` for `tiny_tokenizer`; arguments as for `tiny_language_model`."""
    config_class, _, model_class = _MODEL_CLASSES[family]
    config = _config(family, config_class, tied=True, vocab_rows=vocab_rows)
    config.num_labels = labels
    return _build(getattr(transformers, model_class), config, dtype, seed)


def tiny_process_model(
    family: str = "llama",
    *,
    labels: int = 2,
    two_layers: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
    vocab_rows: int | None = None,
) -> Any:
    """A token classifier in ``eval()`` for `tiny_tokenizer`.

    Args:
        two_layers: whether its head has two layers, as Qwen's process reward models do.
        family, dtype, seed, vocab_rows: as for `tiny_language_model`.
    """
    config_class, _, model_class = _MODEL_CLASSES[family]
    config = _config(family, config_class, tied=True, vocab_rows=vocab_rows)
    config.num_labels = labels
    own = getattr(transformers, model_class.replace("ForSequence", "ForToken"))
    return _build(two_layer_classifier(config) if two_layers else own, config, dtype, seed)


def save_pair(
    directory: Path,
    family: str = "llama",
    reward_family: str = "qwen3",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Writes a language model and a reward model, each with its tokenizer, as ``save_pretrained`` folders.

    Returns:
        The folders ``directory / "language_model"`` and ``directory / "reward_model"``.
    """
    pair = {
        "language_model": tiny_language_model(family, dtype=dtype, seed=seed),
        "reward_model": tiny_reward_model(reward_family, dtype=dtype, seed=seed + 1),
    }
    for name, model in pair.items():
        model.save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
    return directory / "language_model", directory / "reward_model"


def prompt_ids(tokenizer: Any, messages: Sequence[Any] = MESSAGES) -> list[int]:
    """``messages`` and the generation prompt, as ids, by transformers' own one-step rendering."""
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def _config(family: str, config_class: str, *, tied: bool, vocab_rows: int | None) -> Any:
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {
        "vocab_size": vocab_rows or len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if family not in ("gpt_neox", "gpt2"):
        options["num_key_value_heads"] = 1
    if family in ("qwen3", "gemma2", "gemma3"):
        options["head_dim"] = 12
    if family in ("gemma2", "gemma3"):
        # Shorter than the test sequences, and one layer of each kind, so that the window matters.
        options.update(sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=12)
    if family == "gemma2":
        # A low cap, so that its derivative is far from 1.
        options.update(final_logit_softcapping=5.0, attn_logit_softcapping=10.0)
    if family == "gpt2":
        for name, own in (
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("num_hidden_layers", "n_layer"),
        ):
            options[own] = options.pop(name)
        options.update(n_head=options.pop("num_attention_heads"), n_positions=options.pop("max_position_embeddings"))
    return getattr(transformers, config_class)(**options)


def _build(model_class: Any, config: Any, dtype: torch.dtype, seed: int) -> Any:
    # Gemma2 has no sdpa; its eager attention takes the softmax in float32.
    config._attn_implementation = "exact_eager" if config.model_type == "gemma2" else "sdpa"
    model = model_class(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model = model.to(DEVICE, dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        _norm_in_own_dtype(model)
    return model


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            ones = name.endswith("weight") and "Gemma" not in type(model).__name__
            weight.copy_(drawn * 0.1 + (1.0 if ones else 0.0))
        elif "score" in name:
            weight.copy_(drawn)
        elif "layers" in name or ".h." in name:
            weight.copy_(drawn * (1.5 / min(weight.shape) ** 0.5))
        else:
            weight.copy_(drawn * 0.5)


def _norm_in_own_dtype(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            offset = 1.0 if name.startswith("Gemma") else 0.0
            module.forward = functools.partial(_rms_norm, module, float(epsilon), offset)


def _rms_norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (module.weight + offset)


def _exact_eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact_eager", _exact_eager_attention)
AttentionMaskInterface.register("exact_eager", eager_mask)

shared_language_model = functools.cache(tiny_language_model)
"""`tiny_language_model`, built once per set of arguments. For tests that leave the model as it is."""

shared_reward_model = functools.cache(tiny_reward_model)
"""`tiny_reward_model`, built once per set of arguments. For tests that leave the model as it is."""
