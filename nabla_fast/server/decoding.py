"""The models' side of the engine: prompts as token ids, sequences that answer them, and running batches of these."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Seq
from contextlib import ExitStack

from nabla_fast.baselines import sample_seeds
from nabla_fast.config import NablaConfig
from nabla_fast.decoder import Batch, Decoder, Observer
from nabla_fast.generate import Pair, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.objective import Objective
from nabla_fast.proposals import sampler_of
from nabla_fast.sequence import Sequence
from nabla_fast.server.asks import Ask, Prompt

# Forward passes until other lanes have their turn, and new sequences can join.
_PASSES = 8
TokenIds = tuple[int, ...]


def read_prompt(pair: Pair, ask: Ask, prompt: Prompt) -> TokenIds:
    """Token ids of a prompt.

    Raises:
        ValueError, TypeError: if it cannot be read, or leaves no room for a response.
    """
    model = pair.language_model
    if isinstance(prompt, str):
        ids = tuple(pair.tokenizer(prompt)["input_ids"])
    elif isinstance(prompt, tuple):
        ids = prompt
        outside = [token for token in ids if not 0 <= token < model.vocab_size]
        if outside:
            raise ValueError(f"prompt holds token id {outside[0]}; ids are from 0 to {model.vocab_size - 1}")
    else:
        ids = tuple(generation_prompt_ids(pair.tokenizer, prompt, ask.config.chat_template_kwargs))
    # Before the reward model's embeddings of it are looked up, which may be more than there is memory for.
    if model.context_length is not None and len(ids) >= model.context_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and {model.name} takes at most {model.context_length} tokens of "
            "prompt and response together; give a shorter prompt"
        )
    return ids


def make_sequences(pair: Pair, ask: Ask, prompts: Seq[TokenIds]) -> list[list[Sequence]]:
    """The samples of each answer, which have no index yet.

    Answers to one prompt have the seeds that `nabla_fast.generate` gives to one that is asked several times, and their
    samples those of `nabla_fast.baselines.sample`.

    Raises:
        ValueError: if the reward model's template does not take a chat, or a prompt leaves no room for a response.
    """
    rewards, kwargs = pair.reward_model, ask.config.chat_template_kwargs
    frames = [
        rewards.prompt_frame(ids) if isinstance(prompt, (str, tuple)) else rewards.chat_frame(prompt, kwargs)
        for prompt, ids in zip(ask.prompts, prompts, strict=True)
    ]
    copies = [i for i in range(len(prompts)) for _ in range(ask.n)]
    with warnings.catch_warnings():
        # A context with less room than was asked for shows in finish_reason.
        warnings.simplefilter("ignore", UserWarning)
        answers = pair.sequences([prompts[i] for i in copies], [frames[i] for i in copies], ask.config)
    return [
        [
            Sequence(answer.prompt_ids, (), seed, answer.limit, answer.frame)
            for seed in sample_seeds(answer.seed, answer.prompt_ids, ask.samples)
        ]
        for answer in answers
    ]


def lane_config(config: NablaConfig) -> NablaConfig:
    """What sequences must agree in to be decoded in one batch: all but what each has for itself.

    Arguments of the chat templates are not: the gradient cache tells frames of the reward model by what comes before a
    response, and these may change what comes after it.
    """
    return config.replace(max_new_tokens=1, seed=0)


class Lane:
    """A running batch of ``sequences`` with one `lane_config`, with its gradient cache; both end with the last one."""

    def __init__(self, pair: Pair, config: NablaConfig, observer: Observer) -> None:
        self.sequences: set[Sequence] = set()
        with ExitStack() as stack:
            objective = stack.enter_context(Objective(pair.language_model, pair.reward_model, config))
            rollouts = pair.rollouts(config, sampler_of(pair.sampler, objective))
            decoder = Decoder(objective, rollouts, pair.sampler, stop_rule(pair, config), observer)
            self._batch = Batch(decoder)
            stack.callback(self._batch.close)
            self._stack = stack.pop_all()

    def add(self, sequence: Sequence) -> None:
        self.sequences.add(sequence)
        self._batch.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out and frees its caches."""
        self._batch.drop(sequence)
        self.sequences.remove(sequence)

    def step(self) -> list[Sequence]:
        """A few passes of all rollouts, or one position of the sequences whose rollout has ended.

        Returns:
            The sequences that have come to their end.
        """
        if self._batch.arrived:
            self._batch.advance()
        else:
            self._batch.receive(_PASSES)
        finished = {s for s in self.sequences if s.trajectory is not None and s.finished}
        self.sequences -= finished
        return sorted(finished, key=lambda sequence: sequence.index)

    def close(self, error: BaseException | None = None) -> None:
        """Frees everything, and with it graphs where ``error`` is that memory ran out."""
        self._stack.__exit__(None if error is None else type(error), error, None)
