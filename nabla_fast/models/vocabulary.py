"""The mapping between the vocabularies of the language model and the reward model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.chat import encode
from nabla_fast.models.language_model import EmbeddingTable
from nabla_fast.ops import upcast

MINIMUM_SHARE = 0.9


@dataclass(frozen=True)
class Alignment:
    """A language model's tokens in a reward model's vocabulary.

    Attributes:
        partner: (V,) int64, the reward model's id of each token; -1 where it has none.
        share: share of the language model's tokens that have a partner.
        reverse_share: share of the reward model's tokens that are one.
        unmatched: some of the tokens without one, for messages.
    """

    partner: Tensor
    share: float
    reverse_share: float
    unmatched: tuple[str, ...]

    @property
    def close(self) -> bool:
        """Whether the two have so much in common that responses are read token by token.

        A reward model with many tokens more would read text in other ones.
        """
        return min(self.share, self.reverse_share) >= MINIMUM_SHARE

    @property
    def identical(self) -> bool:
        """Whether every token has the same id on both sides."""
        return bool((self.partner == torch.arange(len(self.partner))).all())


def align(tokenizer: Any, reward_tokenizer: Any, vocab_size: int, reward_vocab_size: int) -> Alignment:
    """Aligns two vocabularies by token string.

    Args:
        tokenizer: of the language model, ``vocab_size`` ids.
        reward_tokenizer: of the reward model, ``reward_vocab_size`` ids.

    Warns:
        UserWarning: if some tokens of vocabularies that are `Alignment.close` have no partner, with their number.
    """
    theirs = {token: i for token, i in reward_tokenizer.get_vocab().items() if i < reward_vocab_size}
    ours = [(token, i) for token, i in tokenizer.get_vocab().items() if i < vocab_size]
    unmatched = [token for token, _ in ours if token not in theirs]
    partner = [-1] * vocab_size
    for token, i in ours:
        partner[i] = theirs.get(token, -1)
    share = 1.0 - len(unmatched) / len(ours)
    examples = tuple(sorted(unmatched)[:5])
    reverse_share = (len(ours) - len(unmatched)) / max(len(theirs), 1)
    alignment = Alignment(torch.tensor(partner), share, reverse_share, examples)
    if unmatched and alignment.close:
        warnings.warn(
            f"{len(unmatched)} of {len(ours)} tokens ({1 - share:.2%}) have no partner in the reward model's "
            f"vocabulary, among them {', '.join(map(repr, examples))}; the reward model sees the mean of their pieces",
            stacklevel=2,
        )
    return alignment


def aligned_table(alignment: Alignment, table: EmbeddingTable, tokenizer: Any, reward_tokenizer: Any) -> EmbeddingTable:
    """The reward model's embeddings (V, d_r) in the language model's token order.

    A token without a partner gets the mean embedding of the pieces the reward tokenizer cuts its text into. Without
    any difference between the vocabularies the result is a view of ``table``, no copy.
    """
    size = len(alignment.partner)
    if alignment.identical:
        return EmbeddingTable(table.weight[:size], table.scale)
    partner = alignment.partner.to(table.weight.device)
    weight = table.weight[partner.clamp(min=0)].clone()
    for token_id in (alignment.partner < 0).nonzero().flatten().tolist():
        pieces = encode(reward_tokenizer, tokenizer.decode([token_id]))
        pieces = [piece for piece in pieces if piece < table.weight.shape[0]]
        rows = table.weight[torch.tensor(pieces, dtype=torch.long, device=table.weight.device)]
        weight[token_id] = upcast(rows).mean(0).to(weight.dtype) if pieces else 0
    return EmbeddingTable(weight, table.scale, partner)
