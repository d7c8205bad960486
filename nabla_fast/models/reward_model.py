"""A reward model: a differentiable score of conversations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone, Cache, Inputs, joined
from nabla_fast.models.chat import Chat, conversation_frame
from nabla_fast.models.cross_tokenizer import CrossTokenizer, Reading
from nabla_fast.models.language_model import EmbeddingTable, LanguageModel, context_length, embedding_table
from nabla_fast.models.reward_head import RewardHead, require_embeddings_argument, reward_head
from nabla_fast.models.vocabulary import Alignment, agreement, aligned_table

RewardFunction = Callable[[Tensor, Tensor], Tensor]

_SHORT_CHAT: Chat = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True)
class RewardFrame:
    """The reward model's tokens before and after a response.

    Attributes:
        opening: the P tokens before the response.
        closing: the c tokens after it.
        key: k token ids, what tells this frame from another one over the same prompt.
    """

    opening: Inputs
    closing: Inputs
    key: tuple[int, ...]


class RewardModel:
    """Wraps a sequence classifier with one label, or any function of embeddings.

    It may be on another device than the language model, or on several. A classifier that scores the last token's hidden
    state by its ``score`` module continues cached prefixes. The forward pass of any other one runs as it is, on whole
    conversations. Which of the two it is is found out by trying.

    Args:
        model: an ``AutoModelForSequenceClassification`` with one label, or any model whose forward pass gives one
            number per sequence, in ``eval()``; or a callable that maps (inputs_embeds (B, T, d_r), attention_mask
            (B, T), right-padded) to rewards (B,), differentiable. A callable sees the embeddings of its own
            ``get_input_embeddings()`` if it has that method, else the language model's, each on the device of its
            table.
        tokenizer: the reward model's tokenizer; None takes the language model's.
        language_model: whose tokens are scored.
        language_tokenizer: its tokenizer.
        eos_token_ids: the language model's end tokens; those without a partner in the reward model's vocabulary are
            shown to it as its template's end-of-turn token.

    Attributes:
        table: the reward model's input embeddings in the language model's token order (V, d_r).
        reading_table: those of the tokens that it reads a response in: `table`, or its own where tokenizers differ.
        alignment: which token is which; its ``share`` says how many have a partner.
        cross: reads responses where the vocabularies are not `Alignment.close`; else None.
        name: what errors call the model.
        spread: tokens of a conversation that a token of a response becomes: at the most, or with ``cross`` about.
        backbone: a classifier's, whose passes continue cached prefixes; None for what takes whole conversations.

    Raises:
        TypeError: if ``model`` is nothing that could be called.
        ValueError: if it gives more than one number per sequence, or its gradient is not that of its forward pass; also
            if tokenizers cut text differently though their vocabularies agree, or the reward model's cannot be used
            where they do not.

    Warns:
        UserWarning: if the vocabularies are not the same, with what that means.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        language_model: LanguageModel,
        language_tokenizer: Any,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        own, model = checks.unwrapped(model)
        self.tokenizer = language_tokenizer if tokenizer is None else tokenizer
        self._language_tokenizer = language_tokenizer
        self.context_length: int | None = None
        self.spread = 1
        self.head: RewardHead | None = None
        self._function: RewardFunction | None = None
        own_table: EmbeddingTable = language_model.embedding
        if hasattr(model, "base_model") and hasattr(model, "config"):
            self.name = f"reward_model ({model.config.name_or_path or type(model).__name__})"
            self._examine(model, own)
            own_table = embedding_table(model, self.name)
            self.context_length = context_length(model)
        elif callable(model):
            self.name = f"reward_model ({getattr(model, '__name__', type(model).__name__)})"
            require_embeddings_argument(model, self.name)
            self._function = model
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
        self._own_table = own_table
        self._closing = self._template_closing()
        self.alignment = self._align(language_tokenizer, language_model.vocab_size, eos_token_ids)
        self.cross: CrossTokenizer | None = None
        if self.alignment.close:
            self.table = self.reading_table = aligned_table(
                self.alignment, own_table, language_tokenizer, self.tokenizer
            )
        else:
            ends = eos_token_ids or language_model.eos_token_ids
            vocab_size, end = language_model.vocab_size, self._end_token()
            self.cross = CrossTokenizer(language_tokenizer, self.tokenizer, vocab_size, own_table, ends, end)
            self.table, self.reading_table, self.spread = self.cross.table, own_table, self.cross.spread
            self._warn_of_crossing()

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self._own_table.device

    @property
    def backbone(self) -> Backbone | None:
        return None if self.head is None else self.head.backbone

    def chat_frame(self, chat: Chat, template_kwargs: Mapping[str, Any] | None = None) -> RewardFrame:
        """The frame that the reward tokenizer's chat template puts around a response to ``chat``."""
        frame = conversation_frame(self.tokenizer, chat, template_kwargs, self._language_tokenizer)
        return RewardFrame(
            self._own_table.inputs(frame.opening), self._own_table.inputs(frame.closing), tuple(frame.opening)
        )

    def prompt_frame(self, prompt_ids: Sequence[int]) -> RewardFrame:
        """A frame of the language model's own prompt ids, with the reward tokenizer's closing tokens.

        Raises:
            ValueError: if the prompt has special tokens, such as those of a chat template, and the tokenizers differ.
        """
        if self.cross is None:
            return RewardFrame(self.table.inputs(prompt_ids), self._own_table.inputs(self._closing), ())
        added = self._language_tokenizer.added_tokens_decoder
        # A tokenizer need not have a role for each of its special tokens.
        known = {i for i, token in added.items() if token.special}.union(self._language_tokenizer.all_special_ids)
        special = sorted(known.intersection(prompt_ids[1:]))
        if special:
            raise ValueError(
                f"the prompt's token ids hold {self._language_tokenizer.convert_ids_to_tokens(special[0])!r}, which "
                "reward_tokenizer has no such token for; give the prompt as text or as a chat, so that the reward "
                "model's own template is written"
            )
        opening = self.cross.encode(self._language_tokenizer.decode(list(prompt_ids), skip_special_tokens=True))
        read, closing = map(self._own_table.inputs, (opening, self._closing))
        return RewardFrame(read, closing, tuple(opening))

    @property
    def supports_prefix_cache(self) -> bool:
        """Whether `rewards` continues cached prefixes."""
        return self.backbone is not None and self.backbone.supports_prefix_cache

    def reading(self, tokens: Tensor, frame: RewardFrame) -> Reading:
        """A response (n,) int64 on the CPU, ids of the language model, in the tokens that its conversation has."""
        if self.cross is None:
            return Reading(len(tokens), tokens)
        taken = len(frame.opening) + len(frame.closing)
        return self.cross.read(tokens, None if self.context_length is None else self.context_length - taken)

    def conversation(
        self, frame: RewardFrame, response: Tensor | Reading, start: int | None = None, *, ended: bool = True
    ) -> Inputs:
        """The inputs (T tokens) of a conversation.

        A response that ends with the token that the template would write next keeps one of the two.

        Args:
            response: (n,) int64 on the CPU, ids of the language model; or what `reading` makes of them.
            start: leaves out everything before this token of the reading; None leaves out nothing.
            ended: False for a response that goes on: it is closed only where its last token closes it.
        """
        tokens = self._reading_of(response, frame).tokens
        ends_turn = len(tokens) > 0 and self._closing and self.reading_table.own_id(tokens[-1]) == self._closing[0]
        closing = frame.closing[1:] if ends_turn else frame.closing if ended else frame.closing[:0]
        behind = self.reading_table.inputs(tokens[start:])
        return joined([behind, closing] if start is not None else [frame.opening, behind, closing])

    def response_rows(
        self, reading: Reading, conversation: Inputs, gradient: Tensor, position: int, covered: int
    ) -> Tensor:
        """The gradient (n - position, d_r) at response positions ``position`` and later, of that (T, d_r) with respect
        to a conversation.

        Args:
            reading: of the conversation's response.
            covered: the token of the reading that the conversation begins with; negative if it begins with the opening.
        """
        first = max(covered, 0)
        return reading.rows(gradient[first - covered : len(reading.tokens) - covered], position, first)

    def rewards(
        self, conversations: Sequence[Inputs], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Tensor, list[Cache | None]]:
        """Scores conversations, each behind its cached prefix if it has one; differentiable.

        Args:
            conversations: what follows the prefix, T_b >= 1 tokens each.
            caches: of each prefix; all None unless `supports_prefix_cache`.

        Returns:
            Rewards (B,), float32 or float64; the caches of the whole conversations, None where the model gives none.

        Raises:
            TypeError: if a callable gives no tensor.
            ValueError: if it does not give one number per conversation, or a conversation is too long.
        """
        caches = [None] * len(conversations) if caches is None else caches
        lengths = self.lengths(conversations, caches)
        after: list[Cache | None] = [None] * len(conversations)
        if self.head is not None:
            rewards, after = self.head(caches, conversations)
        else:
            assert self._function is not None
            embeds = torch.nn.utils.rnn.pad_sequence([x.embeds for x in conversations], batch_first=True)
            mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
            rewards = self._function(embeds, mask.long().to(embeds.device))
            if not isinstance(rewards, Tensor):
                raise TypeError(
                    f"{self.name} must return a tensor of rewards of shape ({len(conversations)},), got a "
                    f"{type(rewards).__name__}"
                )
        if rewards.shape != (len(conversations),):
            raise ValueError(
                f"{self.name} must return rewards of shape ({len(conversations)},), got {tuple(rewards.shape)}"
            )
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32)), after

    def lengths(self, conversations: Sequence[Inputs], caches: Sequence[Cache | None]) -> list[int]:
        """Tokens of each conversation, its cached prefix included.

        Raises:
            ValueError: if a conversation is too long for the model.
        """
        lengths = [len(c) + (0 if s is None else len(s)) for c, s in zip(conversations, caches, strict=True)]
        if self.context_length is not None and max(lengths) > self.context_length:
            raise ValueError(
                f"{self.name} takes at most {self.context_length} tokens, got a conversation of {max(lengths)}"
            )
        return lengths

    def _reading_of(self, response: Tensor | Reading, frame: RewardFrame) -> Reading:
        return response if isinstance(response, Reading) else self.reading(response, frame)

    def _examine(self, model: Any, own: Any) -> None:
        self.head = reward_head(model, own, self.name, self.tokenizer)

    def _template_closing(self) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            return ()
        return conversation_frame(self.tokenizer, _SHORT_CHAT).closing

    def _align(self, language_tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> Alignment:
        alignment = agreement(language_tokenizer, self.tokenizer, vocab_size, self._own_table.weight.shape[0])
        for token in eos_token_ids:
            if self._closing and alignment.partner[token] < 0:
                alignment.partner[token] = self._closing[0]
        return alignment

    def _end_token(self) -> int:
        """What the reward model is shown for an end token of the language model with another vocabulary."""
        own = self.tokenizer
        found = [*self._closing[:1], own.eos_token_id, own.sep_token_id]
        end = next((token for token in found if token is not None), None)
        if end is None:
            raise ValueError(
                f"reward_tokenizer ({type(own).__name__}) has neither a chat template nor an end token (eos_token), "
                "and another vocabulary than tokenizer; set reward_tokenizer.eos_token"
            )
        return int(end)

    def _warn_of_crossing(self) -> None:
        assert self.cross is not None
        warnings.warn(
            f"reward_tokenizer has {self.alignment.share:.1%} of the tokens of tokenizer, which has "
            f"{self.alignment.reverse_share:.1%} of its tokens; {self.name} reads responses in tokens of its own, so "
            "rewards are exact, and its gradient is carried over by the text that tokens share, an approximation "
            f"({self.cross.single:.1%} of tokens are a single one there)",
            stacklevel=4,
        )
