"""Tiny models of kinds that do not run in batches behind keys and values, or that read more than embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from nabla_fast.testing.models import tiny_tokenizer

_IDS = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
_V = len(tiny_tokenizer())
_SIZES = {"vocab_size": _V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, **_IDS}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SIZES,
        **_HEADS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **_SIZES, num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"]
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=_V, hidden_size=32, num_hidden_layers=2, state_size=4, **_IDS),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_SIZES,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_ssm=64,
        **_MAMBA,
        embedding_multiplier=5.66,
        lm_head_multiplier=0.04,
    ),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **_SIZES | {"intermediate_size": [32] * 2},
        **_HEADS,
        vocab_size_per_layer_input=_V,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SIZES, **_HEADS, intermediate_size_mlp=32, num_local_experts=2, num_experts_per_tok=1
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=_V,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        max_position_embeddings=128,
        **_IDS,
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=_V,
        hidden_size=32,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        num_heads=2,
        window_size=8,
        max_position_embeddings=128,
        **_IDS,
    ),
}
"""One for each kind: recurrent layers that go on from a state with several tokens (qwen3_next, lfm2, falcon_h1) or
with one (mamba), a multiplier behind the embeddings (falcon_h1), embeddings per layer (gemma3n), a model that is its
own base model (llama4), positions that count columns (bart), windows that the usual fields do not name (gpt_neo)."""


def other_language_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A causal language model of `CONFIGS` in ``eval()``, its weights drawn as large as those of `tiny_models`."""
    config = CONFIGS[name]()
    model_class = transformers.BartForCausalLM if name == "bart" else transformers.AutoModelForCausalLM
    build = model_class if name == "bart" else model_class.from_config
    # Grouped products of experts know no float64.
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=1.0 / min(weight.shape) ** 0.5)
            elif name == "gemma3n" and weight.ndim == 1:
                nn.init.ones_(weight)
    # Bart's has tokens that it forces upon an answer.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=3)
    return model.to(dtype).eval().requires_grad_(False)
