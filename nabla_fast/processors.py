"""Logits processors of a generation config, for `nabla_fast.generate` and for the drop-in alike."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from nabla_fast.sampling import LogitsProcessor, Processors, Sampler
from nabla_fast.sequence import Sequence

# They belong to temperature, top-k and top-p: greedy decoding does without them.
_WARPERS = ("TopHLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper")
# What transformers puts behind its warpers.
_LAST = ("WatermarkLogitsProcessor", "LogitNormalization")
# They follow one answer token by token, or read a batch of a layout of their own.
_STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperNoSpeechDetection",
)
# Calls of a processor that are made twice.
_PROBED_CALLS = 4
# Prompts whose processors are kept: a server meets new ones without end.
_MOST_MADE = 4096


def model_sampler(model: Any, eos_token_ids: Seq[int], vocab_size: int) -> Sampler:
    """The sampler that applies the logits processors of the model's own generation config.

    Temperature, top-k and top-p of that config are no part of it: they are `NablaConfig`'s.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "_get_logits_processor"):
        return Sampler()
    return GenerationSampler(model=model, config=config, eos_token_ids=tuple(eos_token_ids), vocab_size=vocab_size)


@dataclass(frozen=True)
class GenerationSampler(Sampler):
    """A sampler with the logits processors that transformers makes from a generation config.

    They are made for each prompt by itself, because some count its tokens, with the end tokens in effect.

    Attributes:
        model: the transformers model that the config is for.
        config: the generation config; its temperature, top-k and top-p are left out.
        eos_token_ids: end tokens in effect.
        vocab_size: tokens that can be drawn. Processors see scores as wide as the model's head, -inf on the others.
        own: further processors, the caller's. One takes the place of the config's of the same class.

    Raises:
        ValueError: if a processor follows one answer token by token: rollouts come back to earlier positions, and
            drafts look ahead.
    """

    model: Any = None
    config: Any = None
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    own: tuple[LogitsProcessor, ...] = ()
    _made: dict[tuple[tuple[int, ...], int], Processors] = field(default_factory=dict, repr=False, compare=False)
    _probed: dict[int, _Probed] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        scale = getattr(self.config, "guidance_scale", None)
        if scale is not None and scale != 1:
            raise ValueError(
                f"guidance_scale ({scale}) cannot be used with ∇-Reasoner: its processor follows one answer token by "
                "token, and rollouts come back to earlier positions; leave it out"
            )
        self._make((0, 0), 1)  # Refuses what cannot be used before anything is decoded.

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of all processors."""
        return tuple(map(_name, itertools.chain(*self._make((0, 0), 1))))

    @property
    def repetition_penalty(self) -> float | None:
        """See `Sampler.repetition_penalty`; one that leaves part of the prompt out is another penalty."""
        found: list[Any] = list(itertools.chain(*self._make((0, 0), 1)))
        if not found:
            return 1.0
        if len(found) > 1 or type(found[0]) is not RepetitionPenaltyLogitsProcessor:
            return None
        return None if getattr(found[0], "prompt_ignore_length", None) else float(found[0].penalty)

    @property
    def width(self) -> int:
        """Entries of the scores that processors see: those of the model's head."""
        text = self.model.config.get_text_config()
        return max(self.vocab_size, getattr(text, "vocab_size", None) or 0)

    def processors(self, sequence: Sequence) -> Processors:
        key = (sequence.prompt_ids, sequence.limit)
        if key not in self._made:
            if len(self._made) >= _MOST_MADE:
                # Pure functions, which are made again where they are asked for again.
                self._made.clear()
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, prompt_ids: tuple[int, ...], limit: int) -> Processors:
        # The scores' device, which is not the inputs' where the model is on several.
        device = self.model.get_output_embeddings().weight.device
        config = copy.copy(self.config)
        config.temperature, config.top_k, config.top_p = None, None, None
        config.do_sample, config.num_beams, config.num_return_sequences = True, 1, 1
        config.max_length = len(prompt_ids) + limit
        if config.min_new_tokens:
            config.min_length = None  # transformers makes one from the other, by the length of a padded batch.
        eos = torch.tensor(sorted(self.eos_token_ids), device=device)
        config._eos_token_tensor = eos if len(eos) else None
        made = self.model._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([prompt_ids], device=device),
            logits_processor=list(self.own),
            device=device,
            model_kwargs={},
        )
        placed = Processors([], [], [])
        for processor in made:
            mine = any(processor is own for own in self.own)
            name = _name(processor)
            if name in _STATEFUL:
                raise ValueError(
                    f"logits_processor {name} cannot be used with ∇-Reasoner: it follows one answer token by token, "
                    "and rollouts come back to earlier positions; leave it out"
                )
            place = placed.warpers if name in _WARPERS else placed.after if name in _LAST else placed.before
            if mine:
                place, processor = placed.before, self._probed.setdefault(id(processor), _Probed(processor))
            place.append(processor)
        return placed


def own_processors(given: Seq[LogitsProcessor], made: Seq[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    """Those of the processors that a call of ``generate`` came with that are not ``made`` from its generation config.

    transformers hands over both in one list. Two of the same class with the same settings do the same.
    """
    return tuple(p for p in given if not any(type(p) is type(q) and _settings(p) == _settings(q) for q in made))


class _Probed:
    """A caller's logits processor; the first few calls check that equal inputs give equal scores.

    Rollouts come back to earlier positions, and drafts look ahead. So a processor must be a function of
    (input_ids, scores): one that counts its calls or follows one answer would silently be wrong.
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor
        self.__name__ = _name(processor)
        self._asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        answer = self.processor(ids, scores.clone())
        if len(self._asked) < _PROBED_CALLS:
            # Newest first: the same call twice, then an earlier position.
            self._asked.insert(0, (ids, scores.clone(), answer.clone()))
            for asked in self._asked[:2]:
                self._ask_again(*asked)
        return answer

    def _ask_again(self, ids: Tensor, scores: Tensor, expected: Tensor) -> None:
        what, cause = "gave other scores", None
        try:
            again = self.processor(ids, scores.clone())
            if again.shape == expected.shape and torch.equal(again.nan_to_num(), expected.nan_to_num()):
                return
        except Exception as error:
            what, cause = f"raised {type(error).__name__} ({error})", error
        raise ValueError(
            f"logits_processor {self.__name__} must be a function of (input_ids, scores), since rollouts come back to "
            f"earlier positions; asked the same again, it {what}"
        ) from cause


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", None) or type(processor).__name__


def _settings(processor: Any) -> dict[str, Any]:
    # Not tensors and generators, which are made anew for every call.
    plain = (int, float, str, list, tuple, dict, type(None))
    return {name: value for name, value in vars(processor).items() if isinstance(value, plain)}
