"""Pairs of models that both sides of a benchmark decode with, and rollouts that they can share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from published_schedule import Models
from shapes import QWEN3_4B, QWEN25_7B, Shape
from transformers import DynamicCache

import nabla_fast as nf
from nabla_fast.cli.models import quiet_transformers
from nabla_fast.generate import Pair, make_pair
from nabla_fast.models.chat import Message
from nabla_fast.rollout import Rollout, RolloutBackend, RolloutStream, StopRule, rollout
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

_TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)
_SPECIAL = ("<|end|>", "<|start|>", "<|unknown|>")


class Replay:
    """Rollouts that are drawn once and replayed to whoever asks again with the same prompt, prefix and seed."""

    def __init__(self, source: RolloutBackend) -> None:
        self.source = source
        self.drawn: dict[tuple[tuple[int, ...], tuple[int, ...], int], Rollout] = {}

    def open(self, sampling: nf.Sampling, stop: StopRule) -> RolloutStream:
        """See `RolloutBackend.open`."""
        return _AtOnce(lambda sequences: self._replay(sequences, sampling, stop))

    def _replay(self, sequences: list[Sequence], sampling: nf.Sampling, stop: StopRule) -> list[Rollout]:
        keys = [(s.prompt_ids, s.prefix, s.seed) for s in sequences]
        missing = [i for i, key in enumerate(keys) if key not in self.drawn]
        # Without caches, so that neither side gets keys and values that it has not paid for.
        bare = [Sequence(*keys[i], sequences[i].limit) for i in missing]
        new = rollout(self.source, bare, sampling, stop)
        self.drawn.update({keys[i]: drawn for i, drawn in zip(missing, new, strict=True)})
        return [self.drawn[key] for key in keys]


class RandomRollouts:
    """Random tokens and latents up to the limit, for models whose weights are random too.

    They depend on the sequence and on where they begin, not on what comes before, so that both sides get the same ones
    also where rounding made them commit different tokens.
    """

    def __init__(self, pair: Pair) -> None:
        self.weight = pair.language_model.head.weight

    def open(self, sampling: nf.Sampling, stop: StopRule) -> RolloutStream:
        """See `RolloutBackend.open`."""
        return _AtOnce(lambda sequences: [self._one(sequence) for sequence in sequences])

    def _one(self, sequence: Sequence) -> Rollout:
        vocabulary, width = self.weight.shape
        begin, device = len(sequence.prefix), self.weight.device
        generator = torch.Generator(device).manual_seed((sequence.seed + begin) % 2**63)
        tokens = torch.randint(len(_SPECIAL), vocabulary, (sequence.limit - begin,), generator=generator, device=device)
        latents = torch.randn(len(tokens), width, generator=generator, device=device)
        return Rollout(tokens.cpu(), latents.to(self.weight.dtype))


class _AtOnce:
    """A stream whose rollouts end as soon as they are asked for; ``draw`` makes those of all that were submitted."""

    def __init__(self, draw: Callable[[list[Sequence]], list[Rollout]]) -> None:
        self.draw = draw
        self.submitted: list[Sequence] = []

    def submit(self, sequence: Sequence) -> None:
        self.submitted.append(sequence)

    def collect(self) -> list[tuple[Sequence, Rollout]]:
        submitted, self.submitted = self.submitted, []
        return list(zip(submitted, self.draw(submitted), strict=True))

    def close(self) -> None:
        self.submitted = []


class PlainRollouts:
    """Rollouts as a decode without this package has them: prompt and prefix are read anew for each, and a token is one
    pass of the model as it is, behind transformers' own cache.

    Tokens are drawn as ours are, so that both sides get the same ones, and for less than transformers' warpers take.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.sampler = model, Sampler()

    def open(self, sampling: nf.Sampling, stop: StopRule) -> RolloutStream:
        """See `RolloutBackend.open`."""
        return _AtOnce(lambda sequences: [self._one(sequence, sampling, stop) for sequence in sequences])

    def _one(self, sequence: Sequence, sampling: nf.Sampling, stop: StopRule) -> Rollout:
        cache, response, latents = DynamicCache(config=self.model.config), sequence.prefix, []
        fed = [*sequence.prompt_ids, *sequence.prefix]
        while not stop.ended(sequence, response):
            ids = torch.tensor([fed], device=self.model.device)
            out = self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state[:, -1]
            logits = self.model.get_output_embeddings()(hidden)
            fed = self.sampler(logits, sampling, [sequence], [response]).tolist()
            response = (*response, *fed)
            latents.append(hidden)
        if not latents:
            return Rollout(torch.empty(0, dtype=torch.long), self.model.get_output_embeddings().weight[:0])
        return Rollout(torch.tensor(response[len(sequence.prefix) :]), torch.cat(latents))


@dataclass
class Loaded:
    """A pair of models as both sides take it.

    Attributes:
        name: of the pair.
        models: for the published schedule.
        pair: for `nabla_fast`.
    """

    name: str
    models: Models
    pair: Pair


@functools.cache
def smollm2(dtype: str = "float32") -> Loaded:
    """SmolLM2-135M and its reward model on the CPU."""
    from nabla_fast.demo import load_smollm2, load_smollm2_reward

    quiet_transformers()
    models = (*load_smollm2(device="cpu", dtype=dtype), *load_smollm2_reward(device="cpu", dtype=dtype))
    for model in models[::2]:
        # Weights that are mapped from a file leave memory when the system wants it, and would count as what the next
        # call takes.
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return Loaded("SmolLM2-135M", Models(*models), make_pair(*models, nf.NablaConfig()))


def random_pair(
    device: torch.device, language: Shape = QWEN25_7B, reward: Shape = QWEN3_4B, dtype: torch.dtype = torch.bfloat16
) -> Loaded:
    """Models of two real models' sizes with random weights; their speed does not depend on what the weights say.

    The reward model has the language model's vocabulary, since the baseline aligns none.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForSequenceClassification

    quiet_transformers()
    tokenizer = numbered_tokenizer(language.vocabulary)
    common = {"vocab_size": language.vocabulary, "pad_token_id": 2, "eos_token_id": 0, "bos_token_id": None}
    language_config = Qwen2Config(
        hidden_size=language.width, tie_word_embeddings=language.tied, **language.layers, **common
    )
    reward_config = Qwen3Config(
        hidden_size=reward.width, tie_word_embeddings=reward.tied, num_labels=1, **reward.layers, **common
    )
    built = [
        _random(model, config, device, dtype)
        for model, config in ((Qwen2ForCausalLM, language_config), (Qwen3ForSequenceClassification, reward_config))
    ]
    models = (built[0], tokenizer, built[1], tokenizer)
    name = f"{language.name} + {reward.name}, random weights"
    return Loaded(name, Models(*models), make_pair(*models, nf.NablaConfig()))


def numbered_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of ``vocabulary`` words: three special ones and then w3, w4 and so on."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), vocabulary))]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<|end|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def numbered_chat(index: int, words: int = 128) -> list[Message]:
    """The ``index``-th question in the words of `numbered_tokenizer`."""
    text = " ".join(f"w{100 + index * words + i}" for i in range(words))
    return [{"role": "user", "content": text}]


def _random(model_class: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model as transformers initialises it, made where and in what it is to be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
