"""A process reward model as a reward model: rewards of conversations from the scores of a response's steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone, Cache, Inputs, joined
from nabla_fast.models.chat import Chat, encode
from nabla_fast.models.cross_tokenizer import Reading
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_head import Candidate, OwnForward, find_head
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.models.steps import AGGREGATIONS, BLANK_LINE, ProcessReward, step_ends
from nabla_fast.ops import upcast

_HEADS = ("score", "classifier", "v_head")
# What a label that means a right step is called.
_RIGHT = {"+", "1", "correct", "good", "positive", "right", "true", "yes"}


@dataclass(frozen=True)
class StepHead:
    """Logits for every token of a conversation, as the model's own forward pass gives them.

    Attributes:
        backbone: gives the hidden states; None runs the model as it is, on whole conversations, one at a time.
        score: maps hidden states (n, d) to logits (n, labels), behind ``backbone``.
        labels: how many logits a token has.
    """

    own: OwnForward
    backbone: Backbone | None
    score: Callable[[Tensor], Tensor] | None
    labels: int

    def __call__(
        self, caches: Sequence[Cache | None], conversations: Sequence[Inputs], reads: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[Cache | None]]:
        """Logits (k_b, labels) at the positions ``reads`` (k_b) of each conversation, its cached prefix included; and
        the caches of the whole."""
        if self.backbone is None or self.score is None:
            rows = [self.own(x)[list(at)] for x, at in zip(conversations, reads, strict=True)]
            return rows, [None] * len(rows)
        hidden, after = self.backbone(caches, conversations)
        whole = [h if c is None else torch.cat([c.hidden, h]) for c, h in zip(caches, hidden, strict=True)]
        # All reads of a conversation may be in its prefix, where a gradient of zero is asked for all the same.
        states = torch.cat([h[list(at)] + 0 * h[-1] for h, at in zip(whole, reads, strict=True)])
        return list(self.score(states).split([len(at) for at in reads])), after


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
        ValueError: as `step_head` does; also if the separator is no text of the reward tokenizer, or
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
        self._separator = self._own_table.inputs(separator)
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
        return replace(super().chat_frame(chat, template_kwargs), closing=self._separator)

    def prompt_frame(self, prompt_ids: Sequence[int]) -> RewardFrame:
        return replace(super().prompt_frame(prompt_ids), closing=self._separator)

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


def log_scores(logits: Tensor, label: int) -> Tensor:
    """Logarithms (k,), float32 or float64, of the scores that logits (k, labels) give."""
    wide = upcast(logits)
    return logsigmoid(wide[:, 0]) if wide.shape[1] == 1 else wide.log_softmax(-1)[:, label]


def own_logits(out: Any, ids: Tensor, name: str) -> Tensor:
    """The logits (T, labels) in what a model returned for token ids (1, T).

    Raises:
        ValueError: if they are not one row for every token.
    """
    logits = out[0] if isinstance(out, (tuple, list)) and out else getattr(out, "logits", out)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{name} gives {shape} for {ids.shape[1]} tokens; a process reward model gives logits of shape "
            f"(1, {ids.shape[1]}, labels), and a model with one score per conversation is given without ProcessReward"
        )
    return logits[0]


def step_head(model: Any, own: Any, name: str, tokenizer: Any) -> StepHead:
    """A head behind a backbone if its logits are those of the forward pass of ``own``, else that pass.

    ``own`` is the transformers model, or an adapter around it. Errors and warnings are those of `find_head`.
    """
    ids = checks.probe_ids(model, tokenizer)
    forward = OwnForward(own, model.get_input_embeddings(), name, int(ids[0]), own_logits)
    modules = {key: module for key in _HEADS if callable(module := getattr(model, key, None))}
    candidates = [Candidate(key, f"`{key}`", module, lambda rows, _: rows) for key, module in modules.items()]
    reason = f"its logits are not those of a module called {', '.join(_HEADS[:-1])} or {_HEADS[-1]}"
    found = find_head("steps", model, forward, [ids, ids.flip(0), ids[3:]], candidates, reason)
    if found.reason is not None:
        return StepHead(forward, None, None, found.width)
    return StepHead(forward, Backbone(model, name, ids), modules[found.key], found.width)


def right_label(model: Any, labels: int, asked: int | None, name: str) -> int:
    """The label that means a right step.

    Raises:
        ValueError: if it is out of range, or there are several and neither ``asked`` nor the labels' names say it.
    """
    if asked is not None:
        if not 0 <= asked < labels:
            raise ValueError(f"label is {asked}, and {name} has {labels} labels; give 0 to {labels - 1}")
        return asked
    if labels == 1:
        return 0
    names = getattr(model.config, "id2label", None) or {}
    names = {int(i): str(text) for i, text in names.items() if int(i) < labels}
    right = [i for i, text in names.items() if text.strip().lower() in _RIGHT]
    if len(right) == 1:
        return right[0]
    # transformers' own names say nothing, and are what trl and Qwen leave: the second of two is a right step.
    if labels == 2 and not right and all(text == f"LABEL_{i}" for i, text in names.items()):
        return 1
    shown = ", ".join(repr(names.get(i, i)) for i in range(min(labels, 5)))
    raise ValueError(
        f"{name} has {labels} labels ({shown}{', …' if labels > 5 else ''}), and which of them means a right step is "
        "not known; give ProcessReward(model, ..., label=INDEX), or name the label 'correct' in its config's id2label"
    )


def reward_model_of(
    model: Any,
    tokenizer: Any,
    language_model: LanguageModel,
    language_tokenizer: Any,
    eos_token_ids: Collection[int] = (),
) -> RewardModel:
    """Wraps whatever a caller gives as reward model; see `RewardModel` and `ProcessRewardModel`."""
    kind = ProcessRewardModel if isinstance(model, ProcessReward) else RewardModel
    return kind(model, tokenizer, language_model, language_tokenizer, eos_token_ids)
