"""A process reward model as a reward model: rewards of conversations from the scores of a response's steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.backbone import Backbone, Cache, Inputs, joined
from nabla_fast.models.chat import Chat, encode
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reading import Reading
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.models.step_head import StepHead, log_scores, right_label, step_head
from nabla_fast.models.steps import AGGREGATIONS, BLANK_LINE, ProcessReward, step_ends


@dataclass(frozen=True)
class Steps(Inputs):
    """A conversation, or what of it follows a cached prefix.

    Attributes:
        reads: where it is scored, positions of the whole conversation.
        places: the row of each of its response tokens.
    """

    reads: tuple[int, ...]
    places: tuple[int, ...]


class ProcessRewardModel(RewardModel):
    """Wraps a `ProcessReward`.

    A conversation ends with the last separator. In a causal model, the template's closing tokens could not change a
    score before them; nor could an end token of the response, so it is not shown either.

    With a text as separator, cached prefixes are continued where the model allows it. With an inserted one they are
    not: tokens of the response and of the conversation are not the same there, and every call takes whole
    conversations.

    Args:
        process: the model, and how it is read.
        tokenizer, language_model, language_tokenizer, eos_token_ids: as for `RewardModel`.

    Attributes:
        inserts: whether the separator is a token that is put into the conversation.

    Raises:
        ValueError: as `nabla_fast.models.step_head` does; also if the separator is no text of the reward tokenizer, or
            is to be inserted and is no single token, and if the label cannot be told.
    """

    _head: StepHead

    def __init__(
        self,
        process: ProcessReward,
        tokenizer: Any,
        language_model: LanguageModel,
        language_tokenizer: Any,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        if not (hasattr(process.model, "config") and hasattr(process.model, "base_model")):
            raise TypeError(
                f"ProcessReward takes a transformers model with logits for every token, got a "
                f"{type(process.model).__name__}"
            )
        super().__init__(process.model, tokenizer, language_model, language_tokenizer, eos_token_ids)
        self._label = right_label(process.model, self._head.labels, process.label, self.name)
        self._aggregate = AGGREGATIONS[process.aggregation]
        self._values_prefixes = process.values_prefixes
        self._ends_turn = frozenset(eos_token_ids)
        self._text: dict[int, str] = {}
        separator = self._separator_ids(process.separator)
        self._separator = self._read(separator)
        added = process.separator in self.tokenizer.get_added_vocab()
        self.inserts = process.insert_after is not None or added
        self._marker = (process.insert_after or BLANK_LINE) if self.inserts else process.separator
        if self.inserts and len(separator) != 1:
            raise ValueError(
                f"separator is {process.separator!r}, {len(separator)} tokens of reward_tokenizer, and is to be "
                "inserted (insert_after); give a single token, or leave insert_after out"
            )
        # Behind every token of a response, at the most.
        self.spread *= 2 if self.inserts else 1

    @property
    def backbone(self) -> Backbone | None:
        return self._head.backbone

    @property
    def supports_prefix_cache(self) -> bool:
        # A cache of another kind keeps the last hidden state alone, and earlier steps are read too.
        backbone = self.backbone
        cached = backbone is not None and backbone.supports_prefix_cache and backbone.cache_kind == "prefix"
        return cached and not self.inserts

    def chat_frame(self, chat: Chat, template_kwargs: Mapping[str, Any] | None = None) -> RewardFrame:
        frame = super().chat_frame(chat, template_kwargs)
        return RewardFrame(frame.opening, self._separator, frame.key)

    def prompt_frame(self, prompt_ids: Sequence[int]) -> RewardFrame:
        frame = super().prompt_frame(prompt_ids)
        return RewardFrame(frame.opening, self._separator, frame.key)

    def reading(self, tokens: Tensor, frame: RewardFrame) -> Reading:
        # An end token is not shown. One at the most: a cached prefix may reach to the last token.
        ended = len(tokens) > 0 and int(tokens[-1]) in self._ends_turn
        shown = tokens[:-1] if ended else tokens
        return replace(super().reading(shown, frame), size=len(tokens), ended=ended)

    def conversation(
        self, frame: RewardFrame, response: Tensor | Reading, start: int | None = None, *, ended: bool = True
    ) -> Steps:
        """As `RewardModel.conversation`, with what is read and where the response's tokens are.

        A response that goes on is read as one that has ended: its last step is closed, as those were that the model was
        trained on; unless it was trained on all prefixes (`ProcessReward.values_prefixes`).
        """
        reading = self._reading_of(response, frame)
        shown, ended = reading.tokens, ended or reading.ended
        ends, unfinished = step_ends([self._piece(token) for token in shown.tolist()], self._marker)
        before = len(frame.opening)
        closed = unfinished and (ended or not self._values_prefixes)
        if not self.inserts:
            closing = self._separator if closed or not unfinished else self._separator[:0]
            reads = [before + end for end in ends]
            if unfinished:
                reads.append(before + len(shown) + len(closing) - 1)
            inputs = joined([self.reading_table.inputs(shown[start:]), closing])
            first = before if start is None else 0
            places = tuple(range(first, first + len(shown) - (start or 0)))
            whole = joined([frame.opening, inputs]) if start is None else inputs
            return Steps(whole.ids, whole.embeds, tuple(reads), places)
        assert start is None, "a conversation with inserted tokens has no cached prefix"
        marked, separator = set(ends), before + len(shown)
        if closed:
            marked.add(len(shown) - 1)
        order, rows, reads = list(range(before)), [], []
        if closed and not len(shown):
            reads.append(len(order))
            order.append(separator)
        for i in range(len(shown)):
            rows.append(len(order))
            order.append(before + i)
            if i in marked:
                reads.append(len(order))
                order.append(separator)
        if unfinished and not closed:
            reads.append(len(order) - 1)
        apart = joined([frame.opening, self.reading_table.inputs(shown), self._separator])
        chosen = torch.tensor(order, device=apart.device)
        return Steps(apart.ids[chosen], apart.embeds[chosen], tuple(reads), tuple(rows))

    def response_rows(
        self, reading: Reading, conversation: Inputs, gradient: Tensor, position: int, covered: int
    ) -> Tensor:
        assert isinstance(conversation, Steps)
        # Of whole conversations, none of the response is covered, and all of the opening is there.
        places = torch.tensor(conversation.places, dtype=torch.long, device=gradient.device)
        return reading.rows(gradient[places], position, max(covered, 0))

    def rewards(
        self, conversations: Sequence[Inputs], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Tensor, list[Cache | None]]:
        """As `RewardModel.rewards`; conversations are those of `conversation`."""
        caches = [None] * len(conversations) if caches is None else caches
        self.lengths(conversations, caches)
        reads = []
        for conversation in conversations:
            assert isinstance(conversation, Steps)
            reads.append(conversation.reads)
        logits, after = self._head(caches, conversations, reads)
        scores = log_scores(torch.cat(logits), self._label).split([len(at) for at in reads])
        rewards = torch.stack([self._aggregate(own) for own in scores])
        return rewards, after if self.supports_prefix_cache else [None] * len(conversations)

    def _examine(self, model: Any, own: Any) -> None:
        self._head = step_head(model, own, self.name, self.tokenizer)

    def _piece(self, token: int) -> str:
        """The text of a token of a reading."""
        if token not in self._text:
            writer = self._language_tokenizer if self.cross is None else self.tokenizer
            self._text[token] = writer.decode([token])
        return self._text[token]

    def _separator_ids(self, separator: str) -> list[int]:
        ids = encode(self.tokenizer, separator)
        unknown = self.tokenizer.unk_token_id
        if not ids or unknown in ids or max(ids) >= len(self._own_table.weight):
            raise ValueError(
                f"separator is {separator!r}, which reward_tokenizer has no token for; give what {self.name} was "
                "trained with"
            )
        return ids


def reward_model_of(
    model: Any,
    tokenizer: Any,
    language_model: LanguageModel,
    language_tokenizer: Any,
    eos_token_ids: Collection[int] = (),
) -> RewardModel:
    """Wraps whatever a caller gives as reward model; see `RewardModel` and `ProcessRewardModel`."""
    if isinstance(model, ProcessReward):
        return ProcessRewardModel(model, tokenizer, language_model, language_tokenizer, eos_token_ids)
    return RewardModel(model, tokenizer, language_model, language_tokenizer, eos_token_ids)
