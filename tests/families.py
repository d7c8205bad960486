"""Tiny models of every family of causal language models that the installed transformers has.

A family's default configuration is shrunk by the names of its fields. What that gets wrong is in `_OVERRIDES`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from tiny_models import tiny_tokenizer
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

V = len(tiny_tokenizer())
PAD, START, END = 0, 2, 3

# (pattern of a field's name, its tiny value); the first that matches counts.
_FIELDS: tuple[tuple[str, Any], ...] = (
    (r"^(vocab_size\w*|\w*_vocab_size\w*)$", V),
    (r"^(pad_token_id|pad_token_idx)$", PAD),
    (r"^(eos_token_id|sep_token_id|decoder_start_token_id|forced_eos_token_id)$", END),
    (r"^bos_token_id$", START),
    (
        r"^(num_hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers|num_decoder_layers|num_encoder_layers)$",
        2,
    ),
    (r"^(depth|vision_layers|num_hidden_layers_\w+)$", 1),
    (r"^(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads)$", 1),
    (r"^(decoder_attention_heads|encoder_attention_heads|num_attention_heads|n_heads?|num_heads)$", 2),
    (r"^(head_dim|global_head_dim|d_head|v_head_dim|qk_nope_head_dim|attention_head_size|kv_channels|d_kv)$", 16),
    (r"^qk_rope_head_dim$", 8),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank|attention_rank)$", 16),
    (r"^(hidden_size_per_layer_input)$", 8),
    (r"^(hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|emb_dim|embed_dim|lru_width)$", 32),
    (r"^(\w*intermediate_size\w*|\w*ffn_dim\w*|n_inner|d_ff|ffn_hidden_size|\w*ffn_size|inner_dim|ff_dim)$", 32),
    (r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_k|top_k_experts|moe_topk|num_selected_experts)$", 2),
    (r"^(n_group|num_expert_group|topk_group)$", 1),
    (r"^(n_shared_experts|num_shared_experts)$", 1),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 1),
    (r"^(sliding_window|attention_window_size|window_size|local_attention)$", 8),
    (r"^(attention_chunk_size)$", 16),
    (
        r"^(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_target_positions|max_source_positions)$",
        128,
    ),
    (r"^(mamba_n_heads|mamba_num_heads|linear_num_value_heads|num_mamba_heads)$", 4),
    (r"^(linear_num_key_heads)$", 2),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 16),
    (r"^(linear_key_head_dim|linear_value_head_dim)$", 8),
    (r"^(mamba_d_ssm)$", 64),
    (r"^(mamba_n_groups|n_groups|mamba_ngroups)$", 1),
    (r"^(mamba_d_state|ssm_state_size|state_size|mamba_state_size)$", 8),
    (r"^(mamba_chunk_size|chunk_size|block_size)$", 8),
    (r"^(time_step_rank|mamba_dt_rank)$", 4),
    (r"^(image_size)$", 8),
    (r"^(patch_size)$", 4),
)
_MLA = {"num_key_value_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24, "head_dim": 8}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 8},
    "bailing_hybrid": {"num_key_value_heads": 2},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_key_value_heads": 2, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": {"num_key_value_heads": 2},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 2},
    "glm4_moe_lite": {"num_key_value_heads": 2},
    "glm_moe_dsa": {"num_key_value_heads": 2},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "kimi_linear": {"num_key_value_heads": 2},
    "longcat_flash": {"num_key_value_heads": 2, "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 1},
    "reformer": {"axial_pos_embds": False},
    "sarvam_mla": {"num_key_value_heads": 2},
    "youtu": _MLA,
    "zamba": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    "xmod": {"default_language": "en_XX"},
}


def families() -> list[str]:
    """The model types of all causal language models."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """The smallest configuration of a family that has each of its kinds of layers."""
    return _shrunk(configuration_auto.CONFIG_MAPPING[family], _OVERRIDES.get(family, {}))


def _shrunk(config_class: Any, overrides: dict[str, Any]) -> Any:
    values = config_class().to_dict()
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name in getattr(config_class, "attribute_map", {}) or name in ("model_type", "transformers_version"):
            continue
        if name in (getattr(config_class, "sub_configs", None) or {}):
            part = config_class.sub_configs[name]
            if inspect.isclass(part) and part is not transformers.AutoConfig and value is not None:
                options[name] = _shrunk(part, overrides.get(name, {})).to_dict()
            continue
        small = _small(name, value)
        if small is not None:
            options[name] = small
    layers = options.get("num_hidden_layers", 2)
    kinds = values.get("layer_types")
    if kinds:
        kept = list(dict.fromkeys(kinds))
        options["layer_types"] = kept if len(kept) >= 2 else kept * 2
        layers = len(options["layer_types"])
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in options:
                options[name] = layers
    options |= {k: v for k, v in overrides.items() if not isinstance(v, dict) or k not in options}
    return config_class(**options)


def _small(name: str, value: Any) -> Any:
    if value is None and not name.endswith("token_id"):
        return None
    for pattern, small in _FIELDS:
        if re.match(pattern, name):
            if isinstance(value, list):
                return [small] * 2 if value and not isinstance(value[0], list) else None
            return small if not isinstance(value, bool) else None
    return None


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A causal language model of a family in ``eval()``, weights drawn so large that every part matters."""
    return _built(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], family, dtype, seed)


def tiny_reward_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any | None:
    """The family's sequence classifier with one label, or None if it has none or it cannot be made."""
    name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    try:
        return None if name is None else _built(name, family, dtype, seed, num_labels=1)
    except Exception:
        return None


def _built(name: Any, family: str, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    config = tiny_config(family)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.is_decoder = True
        part.is_encoder_decoder = False
        # Grouped products of experts know no float64.
        part._experts_implementation = "eager"
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = getattr(transformers, name if isinstance(name, str) else name[0])(config)
    draw(model)
    # Some families' configurations have tokens that are forced upon an answer.
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def draw(model: Any) -> None:
    """Draws matrices anew, with entries of the size that keeps a row's length."""
    for weight in model.parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            nn.init.normal_(weight, std=1.0 / min(weight.shape[-2:]) ** 0.5)
