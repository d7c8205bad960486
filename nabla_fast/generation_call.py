"""The arguments of one call of ``model.generate``, as settings of ∇-Reasoner."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.generate import Pair, stop_rule
from nabla_fast.processors import GenerationSampler, own_processors
from nabla_fast.rollout import StopRule
from nabla_fast.sampling import Sampler

SAID = (
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("num_return_sequences", "eos_token_id", "stop_strings"),
)
"""Arguments of ``generate`` that are read as the call says them, before transformers fills defaults in."""

_BUILT_IN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)
# transformers' own values for what neither the call nor the model sets.
_LIBRARY_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# Settings of a generation config that ask for another search than ∇-Reasoner's, or for what it does not keep.
_REFUSED = {
    "num_beams": "∇-Reasoner searches by gradients, not by beams",
    "penalty_alpha": "contrastive search is another search",
    "dola_layers": "it draws from the logits of several layers",
    "force_words_ids": "it needs beams",
    "constraints": "they need beams",
    "token_healing": "give a healed prompt",
    "max_time": "give max_new_tokens, or config.max_rollouts",
}
_REFUSED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Model inputs that follow from the token ids, or change nothing.
_DERIVED = ("attention_mask", "position_ids", "cache_position", "past_key_values", "cache", "token_type_ids")


@dataclass
class Call:
    """One call.

    Attributes:
        model: the language model.
        input_ids: (B, P) prompts, each ``copies`` times, padded.
        logits_processor, stopping_criteria: as transformers has prepared them.
        settings: the generation config, with defaults filled in.
        said: what the call itself says of `SAID`.
        model_kwargs: further inputs of the model.

    Raises:
        ValueError: if the call asks for what ∇-Reasoner does not do.
    """

    model: Any
    input_ids: Tensor
    logits_processor: Any
    stopping_criteria: Any
    settings: Any
    said: dict[str, Any]
    model_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        # None is transformers' word for "not said".
        self.said = {name: value for name, value in self.said.items() if value is not None}
        self._refuse_inputs()
        # Those that the call came with, and not those of the generation config, which are made for each prompt anew.
        made = self.model._get_logits_processor(
            self.settings,
            input_ids_seq_length=self.input_ids.shape[1],
            encoder_input_ids=self.input_ids,
            device=self.input_ids.device,
            model_kwargs=self.model_kwargs,
        )
        self._own = own_processors(self.logits_processor or (), made)
        self._expand()
        self.settings = copy.copy(self.settings)
        for name, value in self.said.items():
            setattr(self.settings, name, value)
        self._refuse_settings()

    @property
    def copies(self) -> int:
        """How often each prompt stands in ``input_ids``."""
        return int(self.settings.num_return_sequences or 1)

    @property
    def greedy(self) -> bool:
        """Whether the call, or its generation config against the model's, says that nothing is to be sampled."""
        if "do_sample" in self.said:
            return not self.said["do_sample"]
        return not self.settings.do_sample and bool(getattr(self.model.generation_config, "do_sample", False))

    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts without padding."""
        mask = self.model_kwargs.get("attention_mask")
        keep = torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()
        return [tuple(ids[row].tolist()) for ids, row in zip(self.input_ids, keep, strict=True)]

    def config(self, config: NablaConfig) -> NablaConfig:
        """``config`` with what the call says itself."""
        stop_strings = self.settings.stop_strings or config.stop_strings
        return config.replace(
            rollout=self._rollout(config.rollout),
            resample=Sampling(temperature=0.0) if self.greedy else config.resample,
            eos_token_ids=self._eos_token_ids(config),
            max_new_tokens=self._max_new_tokens(config),
            stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        )

    def stop_rule(self, pair: Pair, config: NablaConfig) -> StopRule:
        """When a response ends."""
        rule = stop_rule(pair, config)
        own = [c for c in self.stopping_criteria or () if not isinstance(c, _BUILT_IN_CRITERIA)]
        return replace(rule, criteria=tuple(_criterion(c, pair.language_model.device) for c in own))

    def sampler(self, pair: Pair) -> Sampler:
        """Draws with the logits processors of the generation config, and with the call's own."""
        return GenerationSampler(
            model=pair.language_model.model,
            config=self.settings,
            eos_token_ids=tuple(sorted(pair.eos_token_ids)),
            vocab_size=pair.language_model.vocab_size,
            own=self._own,
        )

    def _rollout(self, rollout: Sampling) -> Sampling:
        if self.greedy:
            return Sampling(temperature=0.0)
        settings = asdict(rollout)
        settings |= {name: value for name in settings if (value := self._own_value(name)) is not None}
        if settings["top_k"] == 0:  # transformers' way of saying "all"
            settings["top_k"] = None
        if self.said.get("do_sample") and settings["temperature"] == 0:
            raise ValueError(
                "do_sample is True, but the temperature is 0, by config.rollout or by the call; give a temperature "
                "above 0, or do_sample=False"
            )
        if self.settings.top_h is not None and (settings["top_k"], settings["top_p"]) not in ((None, None), (None, 1)):
            raise ValueError(
                f"top_h ({self.settings.top_h}) cannot be combined with top_k ({settings['top_k']}) or top_p "
                f"({settings['top_p']}); give top_k=0 and top_p=1.0 with it"
            )
        return Sampling(**settings)

    def _own_value(self, name: str) -> Any:
        """What the call sets ``name`` to; None where it leaves it at the model's or the library's default.

        transformers fills a generation config up with defaults before we see it, so of one that the call gives only
        a difference shows.
        """
        if name in self.said:
            return self.said[name]
        value = getattr(self.settings, name, None)
        default = getattr(self.model.generation_config, name, None)
        return None if value == (_LIBRARY_DEFAULTS.get(name) if default is None else default) else value

    def _eos_token_ids(self, config: NablaConfig) -> tuple[int, ...] | None:
        eos = self._own_value("eos_token_id")
        if eos is None:
            return config.eos_token_ids
        return (eos,) if isinstance(eos, int) else tuple(torch.as_tensor(eos).flatten().tolist())

    def _max_new_tokens(self, config: NablaConfig) -> int:
        settings, prompt_length = self.settings, self.input_ids.shape[1]
        if settings.max_new_tokens is not None:
            return int(settings.max_new_tokens)
        length = settings.max_length
        # generate turns its own default, 20 new tokens, into a max_length; that is nobody's wish.
        default = min(
            20 + prompt_length, getattr(self.model.config, "max_position_embeddings", None) or 20 + prompt_length
        )
        if length in (None, 20 + prompt_length, default):
            return config.max_new_tokens
        if length <= prompt_length:
            raise ValueError(
                f"max_length ({length}) leaves no room after a prompt of {prompt_length} tokens; give max_new_tokens"
            )
        room = int(length) - prompt_length
        return room if length != self.model.generation_config.max_length else min(room, config.max_new_tokens)

    def _expand(self) -> None:
        """Repeats the prompts as the call says; transformers has repeated them as the generation config says."""
        copies = self.said.get("num_return_sequences")
        if copies is None:
            return
        there = self.copies
        self.input_ids = self.input_ids[::there].repeat_interleave(copies, dim=0)
        mask = self.model_kwargs.get("attention_mask")
        if mask is not None:
            self.model_kwargs["attention_mask"] = mask[::there].repeat_interleave(copies, dim=0)

    def _refuse_inputs(self) -> None:
        if self.input_ids.shape[1] == 0 or self.model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("input_ids is empty, or inputs_embeds is given; ∇-Reasoner needs the prompt as token ids")
        others = [
            name for name, value in self.model_kwargs.items() if isinstance(value, Tensor) and name not in _DERIVED
        ]
        types = self.model_kwargs.get("token_type_ids")
        others += ["token_type_ids"] if types is not None and bool(types.any()) else []
        if others:
            raise ValueError(
                f"{', '.join(others)} cannot be used with ∇-Reasoner, which knows prompts as token ids alone"
            )

    def _refuse_settings(self) -> None:
        for name, why in _REFUSED.items():
            value = getattr(self.settings, name, None)
            if value and not (name == "num_beams" and value == 1):
                wanted = "must be 1" if name == "num_beams" else "cannot be used"
                raise ValueError(f"{name} {wanted} with custom_generate=nabla_fast, got {value!r}; {why}")
        outputs = [name for name in _REFUSED_OUTPUTS if getattr(self.settings, name, None)]
        if outputs and self.settings.return_dict_in_generate:
            raise ValueError(
                f"{', '.join(outputs)} cannot be used with custom_generate=nabla_fast, which returns sequences, "
                "rewards and stats"
            )
        if self.greedy and self.copies > 1:
            raise ValueError(f"num_return_sequences must be 1 without sampling, got {self.copies}; give do_sample=True")
        if any(isinstance(c, MaxTimeCriteria) for c in self.stopping_criteria or ()):
            raise ValueError(f"max_time cannot be used with custom_generate=nabla_fast; {_REFUSED['max_time']}")
        by_prompt = [p for p in self._own if type(p).__name__ == "PrefixConstrainedLogitsProcessor"]
        if by_prompt and len(self.input_ids) > 1:
            raise ValueError(
                "prefix_allowed_tokens_fn takes one prompt at a time with custom_generate=nabla_fast, got a batch of "
                f"{len(self.input_ids)}"
            )


def _criterion(criterion: Any, device: torch.device) -> Callable[[list[int]], bool]:
    return lambda ids: bool(torch.as_tensor(criterion(torch.tensor([ids], device=device), None)).all())
