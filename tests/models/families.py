"""Tiny models of every family of causal language models that the installed transformers has.

A family's default configuration is shrunk by the names of its fields. What that gets wrong is in `_OVERRIDES`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from nabla_fast.testing.models import tiny_tokenizer

V = len(tiny_tokenizer())
PAD, START, END = 0, 2, 3

# (pattern of a field's name, its tiny value); the first that matches counts.
_FIELDS: tuple[tuple[str, Any], ...] = (
    (r"(vocab_size\w*|\w*_vocab_size\w*)", V),
    (r"(pad_token_id|pad_token_idx)", PAD),
    (r"(eos_token_id|sep_token_id|decoder_start_token_id|forced_eos_token_id)", END),
    (r"bos_token_id", START),
    (
        r"(num_hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers|num_decoder_layers|num_encoder_layers)",
        2,
    ),
    (r"(depth|vision_layers|num_hidden_layers_\w+)", 1),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads)", 1),
    (r"(decoder_attention_heads|encoder_attention_heads|num_attention_heads|n_heads?|num_heads)", 2),
    (r"swa_num_(attention|key_value)_heads", 2),
    (r"(head_dim|global_head_dim|d_head|v_head_dim|qk_nope_head_dim|attention_head_size|kv_channels|d_kv)", 16),
    (r"(qk_rope_head_dim|rotary_dim)", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|attention_rank)", 16),
    (r"(hidden_size_per_layer_input|laurel_rank|hc_lowrank|loop_gate_rank|adapter_rank)", 8),
    (r"(hidden_size|hidden_size_global|backbone_hidden_size|d_model|n_embd|dim)", 32),
    (r"(embedding_size|word_embed_proj_dim|emb_dim|embed_dim|lru_width)", 32),
    (r"(\w*intermediate_size\w*|\w*ffn_dim\w*|n_inner|d_inner|d_ff|dff|dim_ff|ff_dim|mlp_dim|inner_dim)", 32),
    (r"(\w*ffn_hidden_size|\w*ffn_size|feed_forward_size|ffn_hidden_dims)", 32),
    (r"(input_embedding_size|output_embedding_size|pronunciation_embed_dim|shape_embed_dim|router_hidden_size)", 16),
    (r"prompt_mid_dim", 16),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_k|top_k_experts|moe_topk|num_selected_experts)", 2),
    (r"zero_expert_num", 2),
    (r"(n_group|num_expert_group|topk_group)", 1),
    (r"(n_shared_experts|num_shared_experts)", 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    # Windows, chunks and choices of keys are shorter than the sequences, so that they matter.
    (r"(sliding_window|sliding_window_size|attention_window_size|window_size)", 8),
    # Beyond it, this family's choice of keys is one among later tokens, and it is not used there.
    (r"keep_window_size", 128),
    (r"(local_attention|local_attention_window_len)", 8),
    (r"(attention_chunk_size|rel_extent)", 16),
    (r"(index_topk)", 4),
    # Keys that no head of an indexer likes are tied, and which of them count would depend on the sequence's length.
    (r"(index_n_heads)", 16),
    (r"(index_head_dim)", 16),
    (r"(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_target_positions|max_source_positions)", 128),
    (r"(max_seq_len|context_length)", 128),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_value_heads|num_mamba_heads)", 4),
    (r"(linear_num_key_heads)", 2),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 16),
    (r"(linear_key_head_dim|linear_value_head_dim)", 8),
    (r"(mamba_d_ssm)", 64),
    (r"(mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"(mamba_d_state|ssm_state_size|state_size|mamba_state_size)", 8),
    (r"(mamba_chunk_size|chunk_size|block_size)", 8),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (r"(image_size)", 8),
    (r"(patch_size)", 4),
    # Factors that are 1 by default in some families, and caps that are far above what tiny models reach.
    (r"(embedding_multiplier|scale_emb)", 3.0),
    (r"(logits_scaling)", 1.5),
    (r"(lm_head_multiplier|residual_multiplier|attention_out_multiplier|ssm_out_multiplier|key_multiplier)", 0.7),
    (r"(logit_scale)", 0.5),
    (r"(attention_multiplier)", 0.4),
    (r"(final_logit_softcapping|logits_soft_cap|output_logit_soft_cap)", 3.0),
    (r"(attn_logit_softcapping)", 5.0),
    (r"(query_pre_attn_scalar)", 16),
    (r"(scale_embedding|use_sliding_window)", True),
)
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
_MLA = {"num_key_value_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_FLOAT32 = ("inkling2_loop_text", "inkling2_text", "xglm")
"""Families that mix float32 with the dtype of their weights, so that they cannot run in float64."""
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "laguna", "mellum"), _MIXED),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "youtu"), _MLA),
    "bailing_hybrid": {"num_key_value_heads": 2},
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {**_MIXED, "rope_parameters": dict.fromkeys(_MIXED["layer_types"], _ROPE)},
    "deepseek_v2": {"num_key_value_heads": 2, "num_experts_per_tok": 2},
    "deepseek_v32": {"num_key_value_heads": 2},
    "deepseek_v4": {"num_hidden_layers": 2, "compress_rates": _COMPRESSED, "mlp_layer_types": ["hash_moe", "moe"]},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **_MIXED},
    "dots3_note_text": {"num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "altup_num_inputs": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm4_moe_lite": {"num_key_value_heads": 2},
    "glm_moe_dsa": {"num_key_value_heads": 2, "indexer_types": ["full", "shared"]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"num_key_value_heads": 2, "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16, **_MIXED},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 1},
    "qwen4_exp_text": _INDEXER | {"ngram_vocab_size_base": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "sarvam_mla": {"num_key_value_heads": 2},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The model types of all causal language models."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, model_class: Any = None) -> Any:
    """The smallest configuration of a family that has each of its kinds of layers.

    Args:
        model_class: what it is for. Where a family's model is one of several behind a common configuration, its
            language model takes the part for text.
    """
    config_class = configuration_auto.CONFIG_MAPPING[family]
    wanted = getattr(model_class, "config_class", None)
    parts = (getattr(config_class, "sub_configs", None) or {}).values()
    return _shrunk(wanted if any(wanted is part for part in parts) else config_class)


def _shrunk(config_class: Any, changes: dict[str, Any] | None = None) -> Any:
    overrides = _OVERRIDES.get(config_class.model_type, {}) | (changes or {})
    values = config_class().to_dict()
    aliases = getattr(config_class, "attribute_map", {})
    options: dict[str, Any] = {}
    for name, value in values.items():
        part = _part(config_class, name, value)
        if name in aliases or name in ("model_type", "transformers_version"):
            continue
        if part is not None:
            options[name] = _shrunk(part, overrides.get(name)).to_dict()
        elif (small := _small(name, value)) is not None:
            options[name] = small
    options |= {name: value for name, value in overrides.items() if not isinstance(options.get(name), dict)}
    kinds = overrides.get("layer_types") or values.get("layer_types")
    if kinds and "num_hidden_layers" not in overrides and "layer_types" not in aliases:
        # One layer of each kind, two at least.
        kept = list(dict.fromkeys(kinds))
        options["layer_types"] = kept if len(kept) >= 2 else kept * 2
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in options:
                options[name] = len(options["layer_types"])
    return config_class(**options)


def _part(config_class: Any, name: str, value: Any) -> Any:
    """The class of the configuration within a configuration that a field holds; None if it holds none."""
    part = (getattr(config_class, "sub_configs", None) or {}).get(name)
    if part is None or not isinstance(value, dict):
        return None
    if inspect.isclass(part) and part is not transformers.AutoConfig:
        return part
    return configuration_auto.CONFIG_MAPPING[value["model_type"]] if value.get("model_type") else None


def _small(name: str, value: Any) -> Any:
    if value is None and not name.endswith("token_id"):
        return None
    for pattern, small in _FIELDS:
        if re.fullmatch(pattern, name):
            if isinstance(value, list):
                return [small] * 2 if value and not isinstance(value[0], list) and "token_id" not in name else None
            return small if isinstance(value, bool) == isinstance(small, bool) else None
    return None


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A causal language model of a family in ``eval()``, weights drawn so large that every part matters."""
    return _built(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], family, dtype, seed)


def tiny_reward_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any | None:
    """The family's sequence classifier with one label, or None if it has none."""
    name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    return None if name is None else _built(name, family, dtype, seed, num_labels=1)


def _built(name: Any, family: str, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(family, model_class)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.is_decoder = True
        part.is_encoder_decoder = False
        # Grouped products of experts know no float64.
        part._experts_implementation = "eager"
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = model_class(config)
    draw(model)
    if getattr(model, "generation_config", None) is not None:
        # Some families end every answer with it at its limit, which a forward pass knows nothing of.
        model.generation_config.forced_eos_token_id = None
        model.generation_config.eos_token_id = END
    dtype = torch.float32 if family in _FLOAT32 else dtype
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def draw(model: Any) -> None:
    """Draws matrices anew, with entries of the size that keeps a row's length, and moves vectors away from 0 and 1."""
    for weight in model.parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            nn.init.normal_(weight, std=1.0 / min(weight.shape[-2:]) ** 0.5)
        elif weight.is_floating_point():
            weight.add_(0.1 * torch.randn_like(weight))
