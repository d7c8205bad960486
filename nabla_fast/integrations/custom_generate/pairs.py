"""Pairs of models that are the same from call to call."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.generate import Pair, end_tokens
from nabla_fast.models.fingerprint import fingerprint
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import reward_model_of
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.steps import ProcessReward
from nabla_fast.rollout import vllm

_ATTRIBUTE = "_nabla_fast_reward"


def kept_pair(model: Any, tokenizer: Any, reward_model: Any, reward_tokenizer: Any, config: NablaConfig) -> Pair:
    """`nabla_fast.generate.make_pair`, whose longest part is kept for the next call with the same models.

    That is the reward model made ready: its embeddings in the order of the language model's tokens. It knows nothing of
    the language model itself, and is kept by the reward model, so that neither outlasts what the caller keeps of them.
    What is verified of either model is remembered elsewhere, by `nabla_fast.models.checks.remembered`.
    """
    language_model = LanguageModel(model, tokenizer)
    eos_token_ids = end_tokens(language_model, config)

    def make() -> RewardModel:
        return reward_model_of(reward_model, reward_tokenizer, language_model, tokenizer, eos_token_ids)

    own = reward_model.model if isinstance(reward_model, ProcessReward) else reward_model
    if hasattr(own, "base_model") and hasattr(own, "config"):
        read_as = replace(reward_model, model=None) if isinstance(reward_model, ProcessReward) else None
        key = (language_model.vocab_size, eos_token_ids, read_as, fingerprint(own))
        tokenizers = (tokenizer, reward_tokenizer)
        kept = vars(own).get(_ATTRIBUTE)
        if kept is None or kept.key != key or any(a is not b for a, b in zip(kept.tokenizers, tokenizers, strict=True)):
            kept = vars(own)[_ATTRIBUTE] = _Kept(key, tokenizers, make())
        rewards = kept.rewards
    else:
        # A function has no embeddings of its own, and would keep the language model's.
        rewards = make()
    return Pair(language_model, tokenizer, rewards, eos_token_ids, vllm.chosen(language_model, config))


class _Kept:
    """What one model keeps: of the last language model, and not of copies of itself."""

    def __init__(self, key: Hashable = None, tokenizers: tuple[Any, Any] = (None, None), rewards: Any = None) -> None:
        self.key, self.tokenizers, self.rewards = key, tokenizers, rewards

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()
