"""Decoding methods to compare with, counted the same way."""

from __future__ import annotations

from typing import Any

from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.decoder import Observer
from nabla_fast.generate import NablaOutput, generate


def greedy(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    config: NablaConfig | None = None,
    *,
    observer: Observer | None = None,
) -> NablaOutput:
    """Greedy decoding, scored once. Arguments as in `nabla_fast.generate`; ``config`` gives lengths and stops."""
    config = (config or NablaConfig()).replace(max_rollouts=1, rollout=Sampling(temperature=0.0))
    return generate(model, tokenizer, reward_model, reward_tokenizer, prompts, config, observer=observer)
