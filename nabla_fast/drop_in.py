"""The drop-in for `model.generate(..., custom_generate=...)`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from nabla_fast.config import NablaConfig
from nabla_fast.decoder import Observer
from nabla_fast.generate import Pair, make_pair, run
from nabla_fast.generation_call import SAID, Call
from nabla_fast.models.chat import as_chats
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.stats import Stats


@dataclass
class NablaGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with rewards and statistics.

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
    """Returns a callable for ``model.generate(**inputs, custom_generate=...)``.

    It is a factory because transformers hands neither ``tokenizer`` nor ``streamer`` to the callable: give both here,
    and never a streamer to ``generate``, which would not end it.

    What the call of ``generate`` says counts, also where it equals a default: ``do_sample=False`` is greedy (rollouts
    and resampling), ``temperature``, ``top_k`` and ``top_p`` are those of the rollouts, and ``max_new_tokens``,
    ``eos_token_id``, ``stop_strings``, ``num_return_sequences``, stopping criteria and logits processors are the call's
    own. What the call does not say is taken from ``config``, except penalties and all other logits processors of the
    model's generation config, which always apply. Of a ``generation_config`` object, which reaches us with all defaults
    filled in, sampling settings, end tokens and ``max_length`` count where they differ from the model's own.
    ``max_new_tokens`` counts wherever it is set. Arguments that change how fast ``generate`` is and not what it gives
    (``use_cache``, ``cache_implementation``, ``assistant_model``, ``prompt_lookup_num_tokens``) change nothing, but
    ``cache_implementation="paged"`` makes transformers leave ``custom_generate`` out.

    Args:
        tokenizer: the language model's tokenizer.
        reward_model, reward_tokenizer: as in `nabla_fast.generate`.
        config: settings; None takes the defaults.
        streamer: a transformers streamer, given the prompt first and then tokens as they are committed; one prompt. It
            is ended in any case, also by an error.
        messages: the chat (or one per prompt) that the prompt ids were made from, formatted exactly for the reward
            model. Without it the reward model sees the same prompt ids, aligned, closed by its own template.

    Returns:
        A callable for ``custom_generate``. It returns (B, P + n) token ids, right-padded, or a `NablaGenerateOutput`
        with ``return_dict_in_generate``.

    Raises:
        ValueError: by the callable, if the call asks for what ∇-Reasoner does not do.
    """
    config = config or NablaConfig()
    pairs: dict[int, tuple[Any, Pair]] = {}

    def pair_of(model: Any, config: NablaConfig) -> Pair:
        # Kept with the model itself, so that its id cannot come to mean another model.
        key = hash((id(model), config.eos_token_ids))
        if key not in pairs:
            pairs[key] = (model, make_pair(model, tokenizer, reward_model, reward_tokenizer, config))
        return pairs[key][1]

    return decoding(pair_of, config, streamer, messages)


def decoding(
    pair_of: Callable[[Any, NablaConfig], Pair], config: NablaConfig, streamer: Any = None, messages: Any = None
) -> Callable[..., Tensor | NablaGenerateOutput]:
    """What `custom_generate` returns, for models that ``pair_of`` makes a pair of, by the settings of the call."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | NablaGenerateOutput:
        try:
            said = {name: model_kwargs.pop(name) for name in SAID if name in model_kwargs}
            call = Call(model, input_ids, logits_processor, stopping_criteria, generation_config, said, model_kwargs)
            if streamer is not None and len(call.input_ids) > 1:
                raise ValueError(f"streamer takes one prompt at a time, got a batch of {len(call.input_ids)}")
            own = call.config(config)
            pair = pair_of(model, own)
            prompts = call.prompts()
            observer = None if streamer is None else _Stream(streamer, call.input_ids)
            frames = _frames(pair, prompts, messages, call.copies, own)
            out = run(pair, prompts, frames, own, call.stop_rule(pair, own), call.sampler(pair), observer)
        finally:
            # Whoever reads from a streamer waits for its end.
            if streamer is not None:
                streamer.end()
        pads = (call.settings.pad_token_id, pair.tokenizer.pad_token_id, *sorted(pair.eos_token_ids), 0)
        pad = next(int(token) for token in pads if token is not None)
        responses = torch.nn.utils.rnn.pad_sequence(out.sequences, batch_first=True, padding_value=pad)
        sequences = torch.cat([call.input_ids, responses.to(call.input_ids.device)], dim=1)
        if not call.settings.return_dict_in_generate:
            return sequences
        return NablaGenerateOutput(sequences=sequences, rewards=torch.tensor(out.rewards), stats=out.stats)  # type: ignore[arg-type]

    # transformers takes out of the call what the signature names, and hands it over as the call said it.
    parameters = [p for p in inspect.signature(decode).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SAID]
    decode.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*parameters, inspect.Parameter("model_kwargs", inspect.Parameter.VAR_KEYWORD)]
    )
    return decode


class _Stream(Observer):
    """Passes committed tokens on to a transformers streamer."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        streamer.put(prompt.cpu())

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        self.streamer.put(torch.tensor(tokens))


def _frames(
    pair: Pair, prompts: Sequence[tuple[int, ...]], messages: Any, copies: int, config: NablaConfig
) -> list[RewardFrame]:
    """The reward model's frame of each response; every prompt occurs ``copies`` times."""
    if messages is None:
        return [pair.reward_model.prompt_frame(prompt) for prompt in prompts]
    chats = as_chats(messages)
    if len(chats) * copies != len(prompts):
        raise ValueError(
            f"messages holds {len(chats)} chats for a batch of {len(prompts) // copies} prompts; give one per prompt"
        )
    ids, frames = pair.prompts(chats, config)
    for index, formatted in enumerate(ids):
        if formatted != prompts[index * copies]:
            warnings.warn(
                f"messages[{index}] gives other token ids by the tokenizer's chat template than the prompt has; the "
                "reward model sees messages (give what the template was called with as config.chat_template_kwargs)",
                stacklevel=3,
            )
    return [frame for frame in frames for _ in range(copies)]
