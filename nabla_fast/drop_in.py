"""The drop-in for `model.generate(..., custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.generate import NablaOutput, Pair, make_pair, run, stop_rule
from nabla_fast.models.chat import as_chats
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.rollout import StopRule
from nabla_fast.sampling import Sampler
from nabla_fast.stats import Stats

_SAMPLING_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_BUILT_IN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)
# transformers' own values for what neither the call nor the model sets.
_LIBRARY_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass
class NablaGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with what ∇-Reasoner adds.

    Attributes:
        rewards: (B,) rewards of the responses.
        stats: counters and seconds per sequence, and totals.
    """

    rewards: Tensor | None = None
    stats: Stats | None = None


def custom_generate(
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any = None,
    config: NablaConfig | None = None,
    streamer: Any = None,
    messages: Any = None,
) -> Callable[..., Tensor | NablaGenerateOutput]:
    """Makes a callable for ``model.generate(**inputs, custom_generate=...)``.

    It is a factory because transformers hands neither ``tokenizer`` nor ``streamer`` to the callable.

    From the call's own generation config come ``max_new_tokens`` (or ``max_length``), ``temperature``, ``top_p`` and
    ``top_k`` of the rollouts, end tokens, logits processors and stopping criteria. What the call leaves at the model's
    default is taken from ``config``. ``do_sample`` plays no part: ``temperature=0`` in ``config.rollout`` is greedy.

    Args:
        tokenizer: the language model's tokenizer.
        reward_model, reward_tokenizer: as in `nabla_fast.generate`.
        config: settings; None takes the defaults.
        streamer: a transformers streamer, given the prompt first and then tokens as they are committed; one prompt.
        messages: the chat (or one per prompt) that the prompt ids were made from, formatted exactly for the reward
            model. Without it the reward model sees the same prompt ids, aligned, closed by its own template.

    Returns:
        A callable for ``custom_generate``. It returns (B, P + n) token ids, right-padded, or a `NablaGenerateOutput`
        with ``return_dict_in_generate``.
    """
    config = config or NablaConfig()
    pairs: dict[int, tuple[Any, Pair]] = {}

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | NablaGenerateOutput:
        _refuse_unsupported(input_ids, generation_config, streamer)
        call_config = _call_config(config, generation_config, model, input_ids.shape[1])
        # Kept with the model itself, so that its id cannot come to mean another model.
        key = hash((id(model), call_config.eos_token_ids))
        if key not in pairs:
            pairs[key] = (model, make_pair(model, tokenizer, reward_model, reward_tokenizer, call_config))
        pair = pairs[key][1]
        mask = model_kwargs.get("attention_mask")
        keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        prompts = [tuple(ids[row].tolist()) for ids, row in zip(input_ids, keep, strict=True)]
        observer = None if streamer is None else _Stream(streamer, input_ids)
        out = run(
            pair,
            prompts,
            _frames(pair, prompts, messages),
            call_config,
            _stop_rule(pair, call_config, stopping_criteria),
            _sampler(logits_processor),
            observer,
        )
        if streamer is not None:
            streamer.end()
        sequences = _pad(input_ids, out, _pad_token(generation_config, pair))
        if not generation_config.return_dict_in_generate:
            return sequences
        return NablaGenerateOutput(sequences=sequences, rewards=torch.tensor(out.rewards), stats=out.stats)  # type: ignore[arg-type]

    return decode


class _Stream:
    """Passes committed tokens on to a transformers streamer."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        streamer.put(prompt.cpu())

    def on_phase(self, phase: str, sequences: int) -> None:
        """Streamers show tokens only."""

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        self.streamer.put(torch.tensor(tokens))


def _refuse_unsupported(input_ids: Tensor, generation_config: Any, streamer: Any) -> None:
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams must be 1 with custom_generate=nabla_fast, got {generation_config.num_beams}; ∇-Reasoner "
            "searches by gradients, not by beams"
        )
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids is empty; ∇-Reasoner needs the prompt as token ids (inputs_embeds is not enough)")
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"streamer takes one prompt at a time, got a batch of {input_ids.shape[0]}")


def _call_config(config: NablaConfig, generation_config: Any, model: Any, prompt_length: int) -> NablaConfig:
    """``config`` with what this call of generate sets itself."""
    rollout = config.rollout
    settings: dict[str, Any] = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
    settings |= {name: value for name in settings if (value := _own_value(generation_config, model, name)) is not None}
    if settings["top_k"] == 0:  # transformers' way of saying "all"
        settings["top_k"] = None
    return config.replace(
        rollout=Sampling(**settings),
        eos_token_ids=_eos_token_ids(config, generation_config, model),
        max_new_tokens=_max_new_tokens(config, generation_config, model, prompt_length),
    )


def _own_value(generation_config: Any, model: Any, name: str) -> Any:
    """What the call sets ``name`` to; None where it leaves it at the model's or the library's default.

    transformers fills a call's generation config up with defaults before we see it, so only a difference shows.
    """
    value = getattr(generation_config, name, None)
    default = getattr(model.generation_config, name, None)
    return None if value == (_LIBRARY_DEFAULTS.get(name) if default is None else default) else value


def _eos_token_ids(config: NablaConfig, generation_config: Any, model: Any) -> tuple[int, ...] | None:
    eos = _own_value(generation_config, model, "eos_token_id")
    if eos is None and config.eos_token_ids is not None:
        return config.eos_token_ids
    eos = generation_config.eos_token_id if eos is None else eos
    return None if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _max_new_tokens(config: NablaConfig, generation_config: Any, model: Any, prompt_length: int) -> int:
    new_tokens = _own_value(generation_config, model, "max_new_tokens")
    if new_tokens is not None:
        return int(new_tokens)
    length = _own_value(generation_config, model, "max_length")
    # generate turns its own default, 20 new tokens, into a max_length; that is nobody's wish. A max_new_tokens of the
    # model's sets max_length too.
    if length in (None, 20 + prompt_length) or generation_config.max_new_tokens is not None:
        return config.max_new_tokens
    if length <= prompt_length:
        raise ValueError(
            f"max_length ({length}) leaves no room after a prompt of {prompt_length} tokens; give max_new_tokens"
        )
    return int(length) - prompt_length


def _frames(pair: Pair, prompts: list[tuple[int, ...]], messages: Any) -> list[RewardFrame]:
    if messages is None:
        return [pair.reward_model.prompt_frame(prompt) for prompt in prompts]
    chats = as_chats(messages)
    if len(prompts) % len(chats):
        raise ValueError(
            f"messages holds {len(chats)} chats for a batch of {len(prompts)} prompts; give one per prompt"
        )
    copies = len(prompts) // len(chats)  # num_return_sequences repeats every prompt in place
    return [pair.reward_model.chat_frame(chat) for chat in chats for _ in range(copies)]


def _stop_rule(pair: Pair, config: NablaConfig, stopping_criteria: Any) -> StopRule:
    rule = stop_rule(pair, config)
    own = [c for c in stopping_criteria or () if not isinstance(c, _BUILT_IN_CRITERIA)]
    criteria = tuple(_criterion(c, pair.language_model.device) for c in own)
    return StopRule(rule.eos_token_ids, rule.stop_strings, rule.tokenizer, criteria)


def _criterion(criterion: Any, device: torch.device) -> Callable[[list[int]], bool]:
    return lambda ids: bool(torch.as_tensor(criterion(torch.tensor([ids], device=device), None)).all())


def _sampler(logits_processor: Any) -> Sampler:
    """The call's logits processors, around our own temperature, top-k and top-p, in transformers' order."""
    others = [p for p in logits_processor or () if not isinstance(p, _SAMPLING_WARPERS)]
    warpers = tuple(p for p in others if type(p).__name__.endswith("Warper"))
    return Sampler(before=tuple(p for p in others if p not in warpers), after=warpers)


def _pad_token(generation_config: Any, pair: Pair) -> int:
    for token in (generation_config.pad_token_id, pair.tokenizer.pad_token_id, *sorted(pair.eos_token_ids)):
        if token is not None:
            return int(token)
    return 0


def _pad(input_ids: Tensor, out: NablaOutput, pad_token: int) -> Tensor:
    responses = torch.nn.utils.rnn.pad_sequence(out.sequences, batch_first=True, padding_value=pad_token)
    return torch.cat([input_ids, responses.to(input_ids.device)], dim=1)
