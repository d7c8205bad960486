"""A reward model as the algorithm needs it: a differentiable score of embedded conversations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.chat import Chat, conversation_frame
from nabla_fast.models.cuts import require_same_cuts
from nabla_fast.models.language_model import (
    EmbeddingTable,
    LanguageModel,
    context_length,
    embedding_table,
    require_eval,
)
from nabla_fast.models.prefix import Body, PrefixState
from nabla_fast.models.vocabulary import Alignment, align, aligned_table

RewardFunction = Callable[[Tensor, Tensor], Tensor]

_SHORT_CHAT: Chat = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True)
class RewardFrame:
    """The embedded conversation around a response, as the reward model sees it.

    Attributes:
        opening: (P, d_r) embeddings before the response.
        closing: (c, d_r) embeddings after it.
        key: (k,) int64, what tells this frame from another one over the same prompt.
    """

    opening: Tensor
    closing: Tensor
    key: Tensor


class RewardModel:
    """Wraps a sequence classifier with one label, or any function of embeddings.

    Args:
        model: an ``AutoModelForSequenceClassification`` with one label in ``eval()``, pooled at the last real token;
            or a callable that maps (inputs_embeds (B, T, d_r), attention_mask (B, T), right-padded) to rewards (B,),
            differentiable. A callable sees the embeddings of its own ``get_input_embeddings()`` if it has that
            method, else the language model's.
        tokenizer: the reward model's tokenizer; None takes the language model's.
        language_model: whose tokens are scored.
        language_tokenizer: its tokenizer.
        eos_token_ids: the language model's end tokens; those without a partner in the reward model's vocabulary are
            shown to it as its template's end-of-turn token.

    Attributes:
        table: the reward model's input embeddings in the language model's token order (V, d_r).
        alignment: which token is which; its ``share`` says how many have a partner.
        name: what errors call the model.
        body: a classifier's decoder, which goes on from prefixes; None for a function, which takes whole conversations.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        language_model: LanguageModel,
        language_tokenizer: Any,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer = language_tokenizer if tokenizer is None else tokenizer
        self.context_length: int | None = None
        self.body: Body | None = None
        own_table: EmbeddingTable = language_model.embedding
        if hasattr(model, "base_model") and hasattr(model, "config"):
            self.name = f"reward_model ({model.config.name_or_path or type(model).__name__})"
            self._score = _score_head(model, self.name)
            self.body = Body(model, self.name)
            own_table = embedding_table(model, self.name)
            self.context_length = context_length(model)
        elif callable(model):
            self.name = f"reward_model ({getattr(model, '__name__', type(model).__name__)})"
            self._function: RewardFunction = model
            if hasattr(model, "get_input_embeddings"):
                own_table = embedding_table(model, self.name)
            elif self.tokenizer.get_vocab() != language_tokenizer.get_vocab():
                raise ValueError(
                    f"reward_tokenizer has another vocabulary than tokenizer, and {self.name} has no embeddings of its "
                    "own to go with it; give None, or a callable with a get_input_embeddings method"
                )
        else:
            raise TypeError(
                "reward_model must be a sequence classifier with one label or a callable that maps (inputs_embeds, "
                f"attention_mask) to rewards, got {type(model).__name__}"
            )
        if own_table.weight.device != language_model.device:
            raise ValueError(
                f"{self.name} is on {own_table.weight.device} and {language_model.name} on {language_model.device}; "
                "put both on the same device"
            )
        self._own_table = own_table
        self._closing = self._template_closing()
        self.alignment = self._align(language_tokenizer, language_model.vocab_size, eos_token_ids)
        self.table = aligned_table(self.alignment, own_table, language_tokenizer, self.tokenizer)

    def chat_frame(self, chat: Chat) -> RewardFrame:
        """The frame that the reward tokenizer's chat template puts around a response to ``chat``."""
        frame = conversation_frame(self.tokenizer, chat)
        return RewardFrame(self._embed(frame.opening), self._embed(frame.closing), self._ids(frame.opening))

    def prompt_frame(self, prompt_ids: Sequence[int]) -> RewardFrame:
        """A frame over the language model's own prompt ids, closed as the reward tokenizer's template closes."""
        return RewardFrame(self.table(self._ids(prompt_ids)), self._embed(self._closing), self._ids(()))

    @property
    def incremental(self) -> bool:
        """Whether `rewards` goes on from prefixes."""
        return self.body is not None and self.body.incremental

    def conversation(self, frame: RewardFrame, tokens: Tensor, start: int | None = None) -> Tensor:
        """Embeddings (T, d_r) of a conversation whose response is ``tokens`` (n,) int64, LM ids.

        A response that ends with the token that the template would write next keeps one of the two.

        Args:
            start: leaves out everything before this response position; None leaves out nothing.
        """
        ends_turn = len(tokens) > 0 and self._closing and int(self.alignment.partner[tokens[-1]]) == self._closing[0]
        closing = frame.closing[1:] if ends_turn else frame.closing
        response = self.table(tokens[start:])
        return torch.cat([response, closing] if start is not None else [frame.opening, response, closing])

    def rewards(
        self, conversations: Sequence[Tensor], states: Sequence[PrefixState | None] | None = None
    ) -> tuple[Tensor, list[PrefixState | None]]:
        """Scores embedded conversations (T_b, d_r), each behind its prefix if there is one; differentiable.

        Args:
            conversations: what follows the prefix, T_b >= 1.
            states: the prefix of each; only None unless `incremental`.

        Returns:
            Rewards (B,), float32 or float64; the states of the whole conversations (None unless `incremental`).

        Raises:
            ValueError: if the reward model does not return one number per conversation, or a conversation is too long.
        """
        states = [None] * len(conversations) if states is None else states
        lengths = [len(c) + (0 if s is None else len(s)) for c, s in zip(conversations, states, strict=True)]
        if self.context_length is not None and max(lengths) > self.context_length:
            raise ValueError(
                f"{self.name} takes at most {self.context_length} tokens, got a conversation of {max(lengths)}"
            )
        after: list[PrefixState | None] = [None] * len(conversations)
        if self.body is not None:
            hidden, after = self.body(states, conversations)
            rewards = self._score(torch.stack([h[-1] for h in hidden])).squeeze(-1)
        else:
            embeds = torch.nn.utils.rnn.pad_sequence(list(conversations), batch_first=True)
            mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
            rewards = self._function(embeds, mask.long().to(embeds.device))
        if rewards.shape != (len(conversations),):
            raise ValueError(
                f"{self.name} must return rewards of shape ({len(conversations)},), got {tuple(rewards.shape)}"
            )
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32)), after

    def _template_closing(self) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            return ()
        return conversation_frame(self.tokenizer, _SHORT_CHAT).closing

    def _align(self, language_tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> Alignment:
        alignment = align(language_tokenizer, self.tokenizer, vocab_size, self._own_table.weight.shape[0])
        if self.tokenizer is not language_tokenizer:
            require_same_cuts(language_tokenizer, self.tokenizer, alignment)
        for token in eos_token_ids:
            if self._closing and alignment.partner[token] < 0:
                alignment.partner[token] = self._closing[0]
        return alignment

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._own_table.weight.device)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._own_table(self._ids(ids))


def _score_head(model: Any, name: str) -> Any:
    """The head of a sequence classifier with one label: hidden states (B, d) to scores (B, 1)."""
    score = getattr(model, "score", None)
    if score is None:
        raise TypeError(f"{name} has no `score` head; give an AutoModelForSequenceClassification of a decoder model")
    labels = score.weight.shape[0]
    if labels != 1:
        raise ValueError(f"{name} has {labels} labels; a reward model has one")
    require_eval(model, name)
    return score
