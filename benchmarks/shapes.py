"""The sizes of real models, from their public configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What the operators see of a model, and what it takes to build one with random weights.

    Attributes:
        name: of the public model.
        vocabulary: V, rows of the output head (``vocab_size``, padding rows included).
        width: d, the hidden size.
        tied: whether the output head is the input embedding.
        softcap: final-logit softcap, 0 for none.
        reward_width: d_r of the reward model it is benchmarked with.
        layers: the rest of its configuration, by transformers' names; empty where no model is built.
    """

    name: str
    vocabulary: int
    width: int
    tied: bool
    softcap: float = 0.0
    reward_width: int = 2560  # of Qwen3-4B, on which the published reward model is built
    layers: dict[str, Any] = field(default_factory=dict)


QWEN25_7B = Shape(
    "Qwen2.5-7B",
    152064,
    3584,
    False,
    layers={
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
)
QWEN3_4B = Shape(
    "Qwen3-4B",
    151936,
    2560,
    True,
    layers={
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
)
LLAMA31_8B = Shape("Llama-3.1-8B", 128256, 4096, False)
GEMMA2_2B = Shape("Gemma-2-2B", 256000, 2304, True, softcap=30.0)
QWEN25_05B = Shape("Qwen2.5-0.5B", 151936, 896, True, reward_width=896)
SMOLLM2_135M = Shape("SmolLM2-135M", 49152, 576, True, reward_width=576)

SHAPES = {s.name: s for s in (QWEN25_7B, QWEN25_05B, LLAMA31_8B, QWEN3_4B, GEMMA2_2B, SMOLLM2_135M)}
