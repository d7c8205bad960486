"""Drafts that a model makes itself, with its weights rounded to 8 bits: a quarter of what a pass in float32 reads.

A pass takes less than half the time of an exact one, and nearly all of its tokens prove right. They are drawn with the
noise of their positions, behind the same keys and values, and verified like any draft: the tokens of a rollout are the
same. `nabla_fast.models.native_layers` computes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from nabla_fast.models.decode_batch import DecodeBatch
from nabla_fast.models.language_model import LanguageModel

# Of a rounded pass over one token, and of each further token of an exact pass, in exact passes over one token
# (SmolLM2-135M; larger models spend less).
_ROUNDED_PASS = 0.35
_MORE_TOKENS = 0.09
# What is taken for known before a response has shown it.
_FIRST_RIGHT, _FIRST_SEEN = 9, 10

# Logits (B, V), and the draft so far of each row → the token that each draws next.
Draw = Callable[[torch.Tensor, Sequence[tuple[int, ...]]], list[int]]


def drafts_itself(model: LanguageModel) -> bool:
    """Whether rounded passes of a model are that much faster: its layers are a native call, in float32."""
    return model.backbone.native is not None and model.head.weight.dtype == torch.float32


@dataclass
class Record:
    """How many of a response's own draft tokens proved right."""

    right: int = _FIRST_RIGHT
    seen: int = _FIRST_SEEN

    def add(self, accepted: int, drafted: int) -> None:
        """Notes that the first ``accepted`` tokens of a draft were right; behind the first wrong one, none says
        anything."""
        self.right += accepted
        self.seen += min(accepted + 1, drafted)

    def length(self, most: int, rows: int) -> int:
        """Tokens of the next draft, at most ``most``, that make the most of the time, in a batch of ``rows``; 0 if none
        does."""
        return _best_length(round(100 * self.right / self.seen), most, rows)


@functools.cache
def _best_length(percent: int, most: int, rows: int) -> int:
    right = percent / 100

    def tokens_per_time(length: int) -> float:
        tokens = sum(right**n for n in range(length + 1))
        return tokens / (1 + _MORE_TOKENS * (rows * (length + 1) - 1) + length * _ROUNDED_PASS)

    return max(range(most + 1), key=tokens_per_time)


def draft(
    model: LanguageModel,
    batch: DecodeBatch,
    last: Sequence[int],
    lengths: Sequence[int],
    draw: Draw,
    ends: Collection[int],
) -> list[tuple[int, ...]]:
    """Draft tokens for each sequence of a batch, which stays as it is.

    Args:
        last: each sequence's last token, which is not in the batch yet.
        lengths: tokens that each wants at most; at least one wants some.
        draw: draws each sequence's next token behind its draft so far.
        ends: tokens behind which nothing is drafted. Other ways to end are not asked for text that may not come.
    """
    drafts: list[tuple[int, ...]] = [()] * len(last)
    endings = {(token,) for token in ends}
    passes = 0
    while True:
        going_on = [
            len(draft) == passes < length and draft[-1:] not in endings
            for draft, length in zip(drafts, lengths, strict=True)
        ]
        if not any(going_on):
            break
        # What sequences that want no more are fed is forgotten, as all of it.
        hidden = batch.step([[(token, *draft)[-1]] for token, draft in zip(last, drafts, strict=True)], rough=True)
        batch.keep([1] * len(last))
        passes += 1
        try:
            drawn = draw(model.rough_logits(torch.cat(hidden)), drafts)
        except FloatingPointError:
            break  # nothing can follow; if that is so, the exact pass says it
        drafts = [
            (*draft, token) if more else draft for draft, token, more in zip(drafts, drawn, going_on, strict=True)
        ]
    if passes:
        batch.forget(passes)
    return drafts
