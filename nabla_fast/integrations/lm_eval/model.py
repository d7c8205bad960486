"""The model `nabla_fast` of lm-evaluation-harness."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

import nabla_fast
from nabla_fast import baselines
from nabla_fast.demo.pairs import PAIRS
from nabla_fast.generate import make_pair, run, stop_rule
from nabla_fast.integrations.lm_eval.arguments import read
from nabla_fast.integrations.lm_eval.generation import configured, logger, warn_once
from nabla_fast.models.chat import Chat, ChatTemplateError, encode
from nabla_fast.models.reward_model import RewardFrame
from nabla_fast.stats import SequenceStats, Stats

# What lm-eval's command line gives where nobody has said anything; without CUDA its own models then run on the CPU.
_DEFAULT_DEVICE = "cuda:0"


class NablaLM(HFLM):
    """∇-Reasoner, or a method to compare with, as a model of lm-evaluation-harness.

    Requests to generate are answered by it; log-likelihoods are the language model's own, computed by the class for
    Hugging Face models, so that multiple-choice tasks give what ``--model hf`` gives. The reward model sees the chat
    that lm-eval formats with ``--apply_chat_template``. Without it the language model continues raw text, and the
    reward model sees the same token ids, closed by its own template.

    Args:
        model_args: see `nabla_fast.integrations.lm_eval.arguments.Arguments`; also any field of `NablaConfig`, and
            rollout_temperature, rollout_top_p, rollout_top_k and the same of resample.

    Attributes:
        pair: both models.
        settings: of the decodes, before a task's own.
        records: counters of each answer so far.

    Raises:
        ValueError, TypeError: for arguments that cannot be used.
    """

    def __init__(self, **model_args: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; the model nabla_fast runs in one process: start it without "
                "accelerate launch or torchrun"
            )
        arguments = read(model_args)
        model, tokenizer, reward_model, reward_tokenizer = arguments.load()
        self.settings, self.arguments = arguments.config, arguments
        self.records: list[SequenceStats] = []
        self.demo = None if arguments.pair is None else PAIRS[arguments.pair]
        self._chats: dict[str, Chat] = {}
        with _quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=arguments.batch_size or 1,
                max_batch_size=self.settings.max_batch_size,
                chat_template_args=dict(self.settings.chat_template_kwargs or {}),
                **arguments.passed_on,
            )
        if isinstance(arguments.pretrained, str):
            # Of a name, lm-eval tells the revision among its results.
            self.pretrained = arguments.pretrained
        self.pair = make_pair(model, tokenizer, reward_model, reward_tokenizer, self.settings)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> NablaLM:
        """As lm-eval's; what ``arg_dict`` says wins over the command line's own options, which have defaults."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if others.get("device") == _DEFAULT_DEVICE and not torch.cuda.is_available():
            del others["device"]
        return cls(**{**others, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> NablaLM:
        """As `create_from_arg_obj`, from ``name=value,name=value``."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def totals(self) -> SequenceStats:
        """Counters and seconds of all answers so far."""
        return Stats(self.records).totals

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's; the chat is kept for the reward model."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        self._chats[text] = [dict(message) for message in chat_history]
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers ``requests``, those with the same generation settings together; in their order.

        Repeated requests get different noise. What each answer took is added to ``records``.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        answers: dict[int, str] = {}
        before = len(self.records)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running generate_until requests") as bar:

            def end(rows: list[int], i: int, text: str) -> None:
                answers[rows[i]] = text
                self.cache_hook.add_partial("generate_until", requests[rows[i]].args, text)
                bar.update(1)

            for rows in groups.values():
                contexts, (gen_kwargs, *_) = zip(*(requests[i].args for i in rows), strict=True)
                self._answer(contexts, gen_kwargs, functools.partial(end, rows))
        _report(self.arguments.method, self.records[before:])
        return [answers[i] for i in range(len(requests))]

    def _answer(
        self, contexts: Sequence[str], gen_kwargs: dict[str, Any], on_answer: Callable[[int, str], None]
    ) -> None:
        arguments = self.arguments
        greedy = arguments.method == "greedy"
        sampling = arguments.task_sampling or greedy
        config = configured(self.settings, gen_kwargs, task_sampling=sampling, longest=arguments.longest)
        prompts, frames = zip(*map(self._prompt, contexts), strict=True)

        def end(i: int, tokens: Tensor) -> None:
            on_answer(i, self._text(tokens.tolist(), config.stop_strings))

        if arguments.method == "best-of-n":
            groups = baselines.sample(
                self.pair,
                prompts,
                frames,
                self._samples,
                config,
                scored=True,
                batch_size=config.max_batch_size,
                on_group=lambda i, group: end(i, group.sequences[baselines.best(group)]),
            )
            self.records += [group.stats for group in groups]
            return
        config = baselines.greedy_settings(config) if greedy else config
        stop = stop_rule(self.pair, config)
        out = run(self.pair, prompts, frames, config, stop, on_end=lambda one: end(one.index, one.current.tokens))
        self.records += out.stats.sequences

    def _prompt(self, context: str) -> tuple[tuple[int, ...], RewardFrame]:
        """The token ids of a context, and what the reward model sees around a response to it."""
        chat = self._chats.get(context)
        if chat is not None:
            return tuple(encode(self.tokenizer, context)), self._frame(chat)
        warn_once(
            "contexts are raw text, which the language model continues; reward models judge conversations: use "
            "--apply_chat_template with a chat model"
        )
        ids = tuple(self.tok_encode(context)) or (self.prefix_token_id,)
        return ids, self.pair.reward_model.prompt_frame(ids)

    def _frame(self, chat: Chat) -> RewardFrame:
        if self.demo is not None:
            self.demo.require([chat])
        try:
            return self.pair.reward_model.chat_frame(chat, self.settings.chat_template_kwargs)
        except ChatTemplateError:
            # lm-eval, too, leaves a system message out where the language model's template does not take it.
            without = [message for message in chat if message["role"] != "system"]
            if len(without) in (0, len(chat)):
                raise
            return self.pair.reward_model.chat_frame(without, self.settings.chat_template_kwargs)

    def _text(self, tokens: list[int], stop: Sequence[str]) -> str:
        """An answer without thoughts, and up to the first stop string, as lm-eval cuts it."""
        mark = self.think_end_token
        thought = isinstance(mark, int) and mark in tokens
        if thought:
            tokens = tokens[len(tokens) - tokens[::-1].index(mark) :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = text.lstrip() if thought else text
        return str(postprocess_generated_text(text, list(stop), mark if isinstance(mark, str) else None))

    @property
    def _samples(self) -> int:
        return self.settings.max_rollouts if self.arguments.n is None else self.arguments.n

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes among its results: also method, settings and counters."""
        own = {
            "version": nabla_fast.__version__,
            "method": self.arguments.method,
            "n": self._samples if self.arguments.method == "best-of-n" else None,
            "task_sampling": self.arguments.task_sampling,
            "settings": self.settings.to_dict(),
            "counters": self.totals.counters(),
            "seconds": self.totals.seconds,
        }
        return {**super().get_model_info(), "nabla_fast": own}


def _report(method: str, records: list[SequenceStats]) -> None:
    totals = Stats(records).totals
    logger.info(
        "%s: %d answers took %d rollouts, %d gradient evaluations, %d reward calls, %d model calls and %.1f s",
        method, len(records), totals.rollouts, totals.gradient_evaluations, totals.reward_calls, totals.model_calls,
        sum(totals.seconds.values()),
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what lm-eval warns of where a model is loaded already, as it is meant here."""
    theirs = logging.getLogger("lm_eval.models.huggingface")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)
