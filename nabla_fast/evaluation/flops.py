"""Estimated floating-point operations of an answer, so that methods can be compared at equal arithmetic.

    FLOPs = 2 P_lm T_lm + 2 P_rm T_rm                          forward passes of sampling and scoring
          + (1 + 1) * 2 (P_lm + P_rm) * n * gradients          forward and backward of every gradient evaluation
          + 4 V d * rows * steps                               the head of every DTO step on latents

P are parameters without the input embedding (a look-up), the output head included; attention over the context is left
out, as is usual. T_lm counts every generated token and, for every rollout, the tokens before it that are filled in
anew; T_rm the tokens of every scored conversation, the part that a proposal shares with the first one left out, and
one for every scored prefix, the rest of which is read with its conversation. A gradient evaluation is charged for all
n tokens of the answer though it runs over those ahead only, which favours methods without gradients. Its backward pass
costs one forward pass, not two as in training: frozen weights get no gradient. A reward model that takes whole
conversations is charged for the whole answer and what stands around it, in every score and gradient.

Samples and rollouts of the decode loop are charged for the prompt each, a search over steps for the tokens that no KV
cache holds (`nabla_fast.search.Prompt`): prompt and opening once, of a continuation and a scored prefix what is new.
Where a model's cache cannot be cropped or shared, searches are charged for what is then read again; with rollouts from
vLLM, for what this process would have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.generate import Pair
from nabla_fast.stats import SequenceStats

_BACKWARD_PER_FORWARD = 1


@dataclass(frozen=True)
class Sizes:
    """Parameters that every token passes through.

    Attributes:
        language: of the language model, its head included.
        reward: of the reward model; 0 for a function, whose size is unknown.
        head: of the language model's head alone.
        continues: whether the reward model continues cached prefixes; otherwise it takes whole conversations.
    """

    language: int
    reward: int
    head: int
    continues: bool = True


def sizes(pair: Pair) -> Sizes:
    """Parameters of the two models of ``pair``."""
    head = pair.language_model.head.weight.numel()
    backbone = pair.reward_model.backbone
    language = _without_tables(pair.language_model.model) + head
    reward = 0 if backbone is None else _without_tables(backbone.model)
    return Sizes(language, reward, head, backbone is None or pair.reward_model.supports_prefix_cache)


def estimate(
    sizes: Sizes,
    stats: SequenceStats,
    config: NablaConfig,
    *,
    prompt: int,
    frame: tuple[int, int],
    response: int,
    conversations: int,
) -> float:
    """The FLOPs of what ``stats`` counts, by the formula of this module.

    Args:
        prompt: tokens of the language model's prompt.
        frame: tokens around a response in the reward model's conversation, before and after it.
        response: tokens of the answer.
        conversations: scored ones that share nothing with each other.
    """
    before = stats.rollouts * prompt + sum(revision.position + 1 for revision in stats.revisions)
    language = before + stats.generated_tokens
    opening, closing = frame
    whole = stats.reward_calls - stats.prefix_rewards
    responses = whole / max(stats.rollouts, 1) * stats.generated_tokens + stats.prefix_rewards
    reward = conversations * opening + responses + whole * closing
    gradients = (1 + _BACKWARD_PER_FORWARD) * response * stats.gradient_evaluations
    if not sizes.continues:
        reward = stats.reward_calls * (opening + response) + whole * closing
        reward += (1 + _BACKWARD_PER_FORWARD) * (opening + closing) * stats.gradient_evaluations
    rows = response if config.update_postfix else 1
    head = 2 * sizes.head * rows * stats.dto_iterations if config.parameterization == "latents" else 0
    return 2.0 * (
        sizes.language * language + sizes.reward * reward + (sizes.language + sizes.reward) * gradients + head
    )


def forward(sizes: Sizes, language: int, reward: int) -> float:
    """The FLOPs of forward passes over so many tokens of each model."""
    return 2.0 * (sizes.language * language + sizes.reward * reward)


def _without_tables(model: Any) -> int:
    """Parameters without input embedding and language-model head, tied or not."""
    tables = {id(model.get_input_embeddings().weight)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)
