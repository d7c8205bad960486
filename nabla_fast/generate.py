"""`nabla_fast.generate`: prompts in, refined answers out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.decoder import Decoder, Observer
from nabla_fast.graphs import usable
from nabla_fast.models.chat import Chat, ChatTemplateError, as_chats, generation_prompt_ids
from nabla_fast.models.checks import one_look
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import reward_model_of
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.objective import Objective
from nabla_fast.processors import model_sampler
from nabla_fast.proposals import sampler_of
from nabla_fast.record import AnswerRecord, Details
from nabla_fast.recorder import Recorder
from nabla_fast.rollout import HFRollout, RolloutBackend, StopRule, VLLMRollout, vllm
from nabla_fast.sampling import Sampler, sequence_seeds
from nabla_fast.sequence import Sequence
from nabla_fast.stats import Stats, summed

if TYPE_CHECKING:
    from nabla_fast.html import Page


@dataclass(frozen=True)
class NablaOutput:
    """Answers to B prompts, in their order.

    Attributes:
        texts: B answers, special tokens left out.
        sequences: B tensors (n_b,) int64 of response token ids, on the CPU.
        rewards: B rewards.
        stats: counters and seconds, one record per prompt and totals.
        details: prompts, settings and what else `to_html` shows; empty of an output that was put together by hand.
    """

    texts: list[str]
    sequences: list[Tensor]
    rewards: list[float]
    stats: Stats
    details: list[Details] = field(default_factory=list, repr=False)

    @property
    def records(self) -> list[AnswerRecord | None]:
        """Probabilities, candidates and gradient norms of each answer's tokens; None without ``record=True``."""
        return [detail.record for detail in self.details] or [None] * len(self.texts)

    def only(self, i: int) -> NablaOutput:
        """The answer to the i-th prompt alone."""
        stats = Stats([self.stats.sequences[i]])
        return NablaOutput([self.texts[i]], [self.sequences[i]], [self.rewards[i]], stats, self.details[i : i + 1])

    def to_html(
        self,
        *,
        best_of_n: NablaOutput | None = None,
        beside: Mapping[str, NablaOutput] = MappingProxyType({}),
        title: str | None = None,
    ) -> Page:
        """A web page of the answers: their tokens, coloured by what happened to them, and what it took.

        The page is one file that needs no network. It is a string to be written to a file as UTF-8; a notebook shows
        it by itself, and this output like ``out.to_html()``. With ``generate(record=True)`` it also tells every token's
        probability, entropy, candidates and gradient norm.

        Args:
            best_of_n: the output of `nabla_fast.baselines.best_of_n` for the same prompts, to be shown beside.
            beside: other outputs for the same prompts, by the names to show them under.
            title: heading of the page; None takes "∇-Reasoner".

        Raises:
            ValueError: if an output beside has another number of answers.
        """
        from nabla_fast.html import page

        return page(self, best_of_n=best_of_n, beside=beside, title=title)

    def _repr_html_(self) -> str:
        return self.to_html()._repr_html_()


def joined(outputs: Seq[NablaOutput]) -> NablaOutput:
    """Several outputs as one, without the gradient cache's counters."""
    return NablaOutput(
        [text for output in outputs for text in output.texts],
        [tokens for output in outputs for tokens in output.sequences],
        [reward for output in outputs for reward in output.rewards],
        Stats([record for output in outputs for record in output.stats.sequences]),
        # Of all answers or of none, so that each stands at its place.
        [detail for output in outputs for detail in output.details] if all(o.details for o in outputs) else [],
    )


@dataclass(frozen=True)
class Pair:
    """A language model and a reward model that fit together; ``vllm``, if it is set, draws the rollouts."""

    language_model: LanguageModel
    tokenizer: Any
    reward_model: RewardModel
    eos_token_ids: frozenset[int]
    vllm: VLLMRollout | None = None

    def rollouts(self, config: NablaConfig, sampler: Sampler | None = None) -> RolloutBackend:
        """The rollout back end. ``sampler`` None applies the logits processors of the model's generation config.

        Raises:
            ValueError: if there are logits processors other than a repetition penalty, which vLLM cannot run.
        """
        sampler = self.sampler if sampler is None else sampler
        if self.vllm is None:
            graphs = config.graphs and usable(self.language_model.device)
            # A draft that is not taken would be scored for nothing.
            drafted = 0 if config.proposal == "guided" else config.draft_tokens
            return HFRollout(self.language_model, sampler, drafted, graphs)
        if sampler.repetition_penalty is None:
            raise ValueError(
                "logits_processor cannot be used with rollouts from vLLM, which knows repetition_penalty alone, and "
                f"the call or model.generation_config asks for {', '.join(sampler.names)}; use rollout_backend='hf', "
                "or leave them out"
            )
        return self.vllm.penalised(sampler.repetition_penalty)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Applies the logits processors of the model's generation config."""
        return model_sampler(self.language_model.model, sorted(self.eos_token_ids), self.language_model.vocab_size)

    def prompts(self, chats: Seq[Chat], config: NablaConfig) -> tuple[list[tuple[int, ...]], list[RewardFrame]]:
        """B chats as the models read them: the language model's prompt ids, and the reward model's frames.

        Raises:
            ValueError: if a template does not take a chat; the message names its index and the template's reason.
        """
        ids, frames = [], []
        for index, chat in enumerate(chats):
            try:
                ids.append(tuple(generation_prompt_ids(self.tokenizer, chat, config.chat_template_kwargs)))
                frames.append(self.reward_model.chat_frame(chat, config.chat_template_kwargs))
            except ChatTemplateError as error:
                raise ChatTemplateError(f"prompts[{index}] cannot be formatted: {error}") from error
        return ids, frames

    def sequences(
        self,
        prompt_ids: Seq[tuple[int, ...]],
        frames: Seq[RewardFrame],
        config: NablaConfig,
        seeds: Seq[int] | None = None,
    ) -> list[Sequence]:
        """Empty responses to B prompts; ``seeds`` (B) None takes those of ``config.seed``.

        Raises:
            ValueError: if a prompt leaves no room for a response.
        """
        seeds = sequence_seeds(config.seed, prompt_ids) if seeds is None else seeds
        return [
            Sequence(ids, (), seed, response_limit(self, i, ids, frame, config), frame, index=i)
            for i, (ids, frame, seed) in enumerate(zip(prompt_ids, frames, seeds, strict=True))
        ]


def generate(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    prompts: Any,
    config: NablaConfig | None = None,
    *,
    observer: Observer | None = None,
    on_answer: Callable[[int, NablaOutput], None] | None = None,
    record: bool = False,
) -> NablaOutput:
    """Answers prompts with ∇-Reasoner (Alg. 1 and 3), up to ``max_batch_size`` together; each gets what it gets alone.

    Args:
        model: a transformers causal language model in ``eval()``.
        tokenizer: its tokenizer, with a chat template.
        reward_model: a sequence classifier with one label in ``eval()``; or a `ProcessReward`, a model that scores the
            steps of an answer; or a differentiable callable that maps (inputs_embeds (B, T, d_r), attention_mask
            (B, T)) to rewards (B,). Either model may be on a device of its own, or on several by accelerate's
            ``device_map``.
        reward_tokenizer: its tokenizer, with a chat template; None takes ``tokenizer``.
        prompts: a string, a chat (list of ``{"role", "content"}``), or a list of either. A chat that ends with an
            assistant's message has it continued: the answer holds what follows, the reward model sees both as one.
        config: settings; None takes the defaults. Of the model's own generation config, temperature, top-k, top-p and
            lengths do not count, since ``config`` has them; end tokens and stop strings do where ``config`` has none,
            penalties and all other logits processors always.
        observer: hears of progress.
        on_answer: hears of each prompt's index and answer when it is finished, while others are under way.
        record: whether to keep probability, entropy, candidates and, where a gradient was known, its norm of each token
            of the answers, see `NablaOutput.records`. It takes one product with the head more, and changes no answer.

    Raises:
        ValueError, TypeError: for arguments that cannot be used; the message names the argument.
        FloatingPointError: if a model gives NaN or infinite values; the message names the model.
        RolloutError: if vLLM cannot be used, or is lost; what was committed until then is in its ``committed``.
    """
    config = config or NablaConfig()
    chats = as_chats(prompts)
    pair = make_pair(model, tokenizer, reward_model, reward_tokenizer, config)
    prompt_ids, frames = pair.prompts(chats, config)

    def end(sequence: Sequence) -> None:
        if on_answer is not None:
            on_answer(sequence.index, _output(pair, [sequence], config, [chats[sequence.index]]))

    stop = stop_rule(pair, config)
    return run(pair, prompt_ids, frames, config, stop, observer=observer, on_end=end, chats=chats, record=record)


@one_look()
def make_pair(model: Any, tokenizer: Any, reward_model: Any, reward_tokenizer: Any, config: NablaConfig) -> Pair:
    """Checks two models and their tokenizers, and wraps them as a pair."""
    language_model = LanguageModel(model, tokenizer)
    eos_token_ids = end_tokens(language_model, config)
    rewards = reward_model_of(reward_model, reward_tokenizer, language_model, tokenizer, eos_token_ids)
    return Pair(language_model, tokenizer, rewards, eos_token_ids, vllm.chosen(language_model, config))


def stop_rule(pair: Pair, config: NablaConfig) -> StopRule:
    """The stop rule of ``config``; its stop strings, if any, replace those of the model's generation config."""
    own = getattr(getattr(pair.language_model.model, "generation_config", None), "stop_strings", None) or ()
    own = (own,) if isinstance(own, str) else tuple(own)
    return StopRule(pair.eos_token_ids, config.stop_strings or own, pair.tokenizer)


def run(
    pair: Pair,
    prompt_ids: Seq[tuple[int, ...]],
    frames: Seq[RewardFrame],
    config: NablaConfig,
    stop: StopRule,
    sampler: Sampler | None = None,
    observer: Observer | None = None,
    seeds: Seq[int] | None = None,
    on_end: Callable[[Sequence], None] = lambda _: None,
    enough: Callable[[Sequence], bool] | None = None,
    chats: Seq[Chat] | None = None,
    record: bool = False,
) -> NablaOutput:
    """Decodes token prompts (B), each with its reward frame, together.

    Args:
        seeds: (B) of their noise; None takes those of `config.seed`.
        on_end: hears of each sequence when it has come to its end, while others are under way.
        enough: see `nabla_fast.decoder.Decoder`.
        chats: (B) the prompts as messages, for the output's details; None where there are none.
        record: as in `generate`.
    """
    ops.resolve("relaxed_stats", config.backend, pair.language_model.device.type)
    sampler = pair.sampler if sampler is None else sampler
    sequences = pair.sequences(prompt_ids, frames, config, seeds)
    # A caller's inference mode would make tensors that autograd cannot use.
    outside = (torch.inference_mode(False), torch.no_grad())
    with outside[0], outside[1], Objective(pair.language_model, pair.reward_model, config) as objective:
        rollouts = pair.rollouts(config, sampler_of(sampler, objective))
        decoder = Decoder(objective, rollouts, sampler, stop, observer, enough)
        recorder = Recorder(objective) if record else None
        # Closed here, so that an error of on_end does not keep its rollouts, and their graphs, under way.
        with closing(decoder.finishing(sequences)) as finishing:
            for ended in finishing:
                if recorder is not None:
                    ended.record = recorder.record(ended)
                on_end(ended)
    drawn = rollouts.graph_stats() if isinstance(rollouts, HFRollout) else {}
    output = _output(pair, sequences, config, chats)
    output.stats.cache = {} if objective.cache is None else objective.cache.stats()
    output.stats.graphs = summed([objective.graph_stats(), drawn])
    return output


def _output(pair: Pair, sequences: Seq[Sequence], config: NablaConfig, chats: Seq[Chat] | None) -> NablaOutput:
    """The answers of finished sequences, and what was counted for each of them."""
    tokens = [s.current.tokens for s in sequences]
    details = [
        Details(chat, config, pair.tokenizer, s.current.tokens.tolist(), s.stats.revisions, s.record)
        for chat, s in zip([()] * len(sequences) if chats is None else chats, sequences, strict=True)
    ]
    return NablaOutput(
        texts=[pair.tokenizer.decode(t, skip_special_tokens=True) for t in tokens],
        sequences=tokens,
        rewards=[s.current.reward for s in sequences],
        stats=Stats([s.stats for s in sequences]),
        details=details,
    )


def response_limit(pair: Pair, index: int, prompt_ids: tuple[int, ...], frame: RewardFrame, config: NablaConfig) -> int:
    """Longest response to a prompt that both models' contexts and ``config.max_new_tokens`` allow.

    Raises:
        ValueError: if a model's context has no place for a response at all.

    Warns:
        UserWarning: if the response may have to end before ``max_new_tokens``.
    """
    if not prompt_ids:
        raise ValueError(f"prompts[{index}] is empty; give at least one token")
    limit = config.max_new_tokens
    reward_tokens = len(frame.opening) + len(frame.closing)
    models = ((pair.language_model, len(prompt_ids), 1), (pair.reward_model, reward_tokens, pair.reward_model.spread))
    for model, used, spread in models:
        if model.context_length is None:
            continue
        room = (model.context_length - used) // spread
        if room < 1:
            raise ValueError(
                f"prompts[{index}] has {used} tokens, and {model.name} takes at most {model.context_length} tokens of "
                "prompt and response together; give a shorter prompt"
            )
        if room < limit:
            warnings.warn(
                f"prompts[{index}]: {model.name} has room for {room} response tokens, fewer than max_new_tokens "
                f"({config.max_new_tokens}); the response ends there",
                stacklevel=3,
            )
            limit = room
    return limit


def end_tokens(language_model: LanguageModel, config: NablaConfig) -> frozenset[int]:
    """The end tokens of ``config``, else the model's own.

    Raises:
        ValueError: if one of ``config.eos_token_ids`` is not in the vocabulary.
    """
    if config.eos_token_ids is None:
        return language_model.eos_token_ids
    outside = [token for token in config.eos_token_ids if token >= language_model.vocab_size]
    if outside:
        raise ValueError(
            f"eos_token_ids must be below {language_model.vocab_size}, the vocabulary size, got {outside[0]}"
        )
    return frozenset(config.eos_token_ids)
