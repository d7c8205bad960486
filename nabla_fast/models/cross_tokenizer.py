"""A reward model whose tokenizer cuts text into other tokens than the language model's.

The reward model reads the text of a response in its own tokens, as it would on its own, so rewards are exact. Gradients
are carried over by the text that tokens have in common. The gradient at a reward token belongs to the response tokens
whose text it holds, in proportion to how much of it; and a token of the language model has the embeddings of the reward
tokens that its text is cut into. The first tokens have a slot each, so that 48 and 84 are not the same where the reward
model reads digits. To first order, that is what the reward changes by where as many tokens take the place of those that
were there; elsewhere it is an approximation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from nabla_fast.models.language_model import EmbeddingTable
from nabla_fast.models.vocabulary import rows_of_tokens
from nabla_fast.ops import upcast
from nabla_fast.spelling import UNFINISHED, pieces

# Texts stand behind it: some tokenizers write a token otherwise at the beginning of a text, or put a space there. Most
# tokenizers end a token with a line, whatever follows.
_BEFORE = "\n"
_CHUNK = 8192
MOST_SLOTS = 3
_CUTS: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[int, ...], list[tuple[int, ...]]]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class Spans:
    """Which of m tokens are read at each of n positions of a response.

    Attributes:
        index: (n, k) int64, rows in ascending order.
        share: (n, k) how much of each token belongs to the position, in [0, 1]; 0 where there are fewer than k.
        slots: of a gradient at a position: one for each of its first tokens, and the last one for all others.
    """

    index: Tensor
    share: Tensor
    slots: int


@dataclass(frozen=True)
class Reading:
    """A response of n tokens of the language model as a reward model reads it.

    Attributes:
        size: n.
        tokens: (m,) int64, on the CPU, ids of the reward model's ``reading_table``.
        spans: where they are read; None if token i is read at position i. At positions past those nothing is.
        ended: whether its last token is an end token that is not among ``tokens``.
    """

    size: int
    tokens: Tensor
    spans: Spans | None = None
    ended: bool = False

    def first(self, position: int) -> int:
        """The first token that is read at response position ``position`` or later; with spans the last one, if no other
        is."""
        if self.spans is None:
            return position
        read = self.spans.index[position:][self.spans.share[position:] > 0]
        return min([*read.tolist(), max(len(self.tokens) - 1, 0)])

    def rows(self, gradient: Tensor, position: int, first: int) -> Tensor:
        """The gradient (n - position, slots * d) at response positions ``position`` and later: those at its tokens, by
        their shares.

        Args:
            gradient: (m - first, d) at the tokens from ``first`` on.
        """
        own = gradient[position - first :] if self.spans is None else self._in_slots(gradient, position, first)
        nothing = self.size - position - len(own)
        return torch.cat([own, own.new_zeros(nothing, own.shape[1])]) if nothing else own

    def _in_slots(self, gradient: Tensor, position: int, first: int) -> Tensor:
        assert self.spans is not None
        width = self.spans.slots * gradient.shape[1]
        if not len(gradient):
            return gradient.new_zeros(0, width)
        index, share = (x[position:].to(gradient.device) for x in (self.spans.index, self.spans.share))
        # What lies before ``first`` has a share of 0 here.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        found = gradient[(index - first).clamp(min=0)].to(dtype) * share.to(dtype).unsqueeze(-1)
        alone = self.spans.slots - 1
        rest = found[:, alone:].sum(1, keepdim=True)
        return torch.cat([found[:, :alone], rest], dim=1).reshape(-1, width).to(gradient.dtype)


class CrossTokenizer:
    """Reads responses in a reward model's tokens, and has its embeddings for the language model's vocabulary.

    Args:
        tokenizer: of the language model, V ids.
        reward_tokenizer: of the reward model; a fast one, which tells where in a text its tokens are.
        vocab_size: V.
        table: the reward model's input embeddings.
        ends: end tokens of the language model; at the end of a response, they are read as ``closing``.
        closing: the reward model's token that ends a turn.
        most_slots: of ``slots``.

    Attributes:
        slots: how many of the tokens that a text is cut into are told apart, at most ``most_slots``.
        table: (V, slots * d_r) their embeddings, one after the other. The last slot has the mean of all others; 0 where
            there are none, as for a token without text, or one that is no whole character.
        single: share of the V tokens whose text is one token of the reward model's.
        spread: how many tokens of the reward model one of the language model is counted as where room is to be left for
            a response: half more than the mean.

    Raises:
        ValueError: if ``reward_tokenizer`` does not tell where its tokens are, or cannot read texts of its own tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        reward_tokenizer: Any,
        vocab_size: int,
        table: EmbeddingTable,
        ends: Collection[int],
        closing: int,
        most_slots: int = MOST_SLOTS,
    ) -> None:
        if not getattr(reward_tokenizer, "is_fast", False):
            raise ValueError(
                f"reward_tokenizer is a {type(reward_tokenizer).__name__}, which does not tell where in a text its "
                "tokens are, as it has to if it is not the language model's; give a fast tokenizer (one with a "
                "tokenizer.json)"
            )
        self._tokenizer, self._reward_tokenizer = tokenizer, reward_tokenizer
        self._ends, self._closing = frozenset(ends), closing
        self._require_readable()
        cuts = list(_cuts(tokenizer, reward_tokenizer, vocab_size, len(table.weight)))
        for end in self._ends:
            cuts[end] = (closing,)
        counts = [len(own) for own in cuts if own]
        self.single = counts.count(1) / vocab_size
        self.spread = math.ceil(1.5 * sum(counts) / max(len(counts), 1))
        self.slots = min(most_slots, max([1, *counts]))
        self.table = EmbeddingTable(_in_slots(table.weight, cuts, self.slots), table.scale)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, which does not begin a conversation."""
        return self._located(text)[0]

    def read(self, tokens: Tensor, room: int | None = None) -> Reading:
        """A response (n,) int64 in the reward model's tokens.

        Special tokens have no text and are not shown, but for an end token at the end of a response.

        Args:
            room: tokens that the reward model takes; None for any number.

        Warns:
            UserWarning: if it has no room for all of them; it is shown the first ones.
        """
        ids = tokens.tolist()
        parts = [part for part in pieces(self._tokenizer, ids) if not part.special and part.text]
        text = "".join(part.text for part in parts)
        read, offsets = self._located(text)
        shares: list[list[tuple[int, float]]] = [[] for _ in ids]
        ends = list(accumulate(len(part.text) for part in parts))
        at = 0
        for j, (start, end) in enumerate(offsets):
            # Both lists are in the order of the text, and several tokens can share a character.
            while at < len(parts) - 1 and ends[at] <= start:
                at += 1
            for i in range(at, len(parts)):
                begin = ends[i] - len(parts[i].text)
                if begin >= end:
                    break
                # No tokenizer is known to have tokens without any text; they would belong nowhere.
                common = (min(end, ends[i]) - max(start, begin)) / max(end - start, 1)
                members = range(parts[i].start, parts[i].end)
                for member in members:
                    shares[member].append((j, common / len(members)))
        if ids and ids[-1] in self._ends:
            shares[-1].append((len(read), 1.0))
            read = [*read, self._closing]
        if room is not None and len(read) > room:
            warnings.warn(
                f"a response of {len(ids)} tokens has {len(read)} in the reward model, which has room for {room}: the "
                "rest is not scored; lower max_new_tokens",
                stacklevel=2,
            )
            read = read[:room]
            shares = [[(j, w) for j, w in own if j < room] for own in shares]
        most = max([self.slots, *map(len, shares)])
        padded = [[*own, *[(0, 0.0)] * (most - len(own))] for own in shares]
        index = torch.tensor([[j for j, _ in own] for own in padded], dtype=torch.long).view(len(ids), most)
        share = torch.tensor([[w for _, w in own] for own in padded], dtype=torch.float64).view(len(ids), most)
        return Reading(len(ids), torch.tensor(read, dtype=torch.long), Spans(index, share, self.slots))

    def _require_readable(self) -> None:
        """Raises ValueError if the reward tokenizer leaves out more than 1 % of texts that its own tokens spell, as one
        does that was loaded with another family's rules."""
        own = self._reward_tokenizer
        letters = lost = 0
        for text in rows_of_tokens(own, list(own.get_vocab().values())):
            ids, offsets = self._located(text)
            read: set[int] = set()
            unknown: set[int] = set()
            for i, (start, end) in zip(ids, offsets, strict=True):
                (unknown if i == own.unk_token_id else read).update(range(start, end))
            letters += len(text)
            # Many tokenizers leave out spaces, none has unknown tokens in their place.
            lost += sum(k in unknown or (k not in read and not letter.isspace()) for k, letter in enumerate(text))
        if lost > letters / 100:
            raise ValueError(
                f"reward_tokenizer leaves out {lost} of {letters} characters of texts that its own tokens spell; give "
                "one that reads them (PreTrainedTokenizerFast.from_pretrained keeps a checkpoint's own rules where "
                "AutoTokenizer takes its family's)"
            )

    def _located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text, and where in it they start and end."""
        size = len(_BEFORE)
        ids, offsets = self._encode(_BEFORE + text)
        if any(start < size < end for start, end in offsets):
            # A token reaches over the beginning.
            return self._encode(text)
        own = [(i, (start - size, end - size)) for i, (start, end) in zip(ids, offsets, strict=True) if end > size]
        return [i for i, _ in own], [where for _, where in own]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self._reward_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), list(out["offset_mapping"])


def _cuts(tokenizer: Any, reward_tokenizer: Any, vocab_size: int, known: int) -> list[tuple[int, ...]]:
    """The reward model's tokens, of those below ``known``, of each token's text; none for a token without text.

    A large vocabulary takes seconds, so what was found is kept for as long as both tokenizers live.
    """
    kept = _CUTS.setdefault(tokenizer, WeakKeyDictionary()).setdefault(reward_tokenizer, {})
    key = (len(tokenizer), len(reward_tokenizer), vocab_size, known)
    if key not in kept:
        kept[key] = _cut(tokenizer, reward_tokenizer, vocab_size, known)
    return kept[key]


def _cut(tokenizer: Any, reward_tokenizer: Any, vocab_size: int, known: int) -> list[tuple[int, ...]]:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        out = reward_tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False) if texts else {}
        return out.get("input_ids", [])

    texts = _texts(tokenizer, vocab_size)
    # Most are found in the vocabulary, which is faster than cutting them.
    theirs = _texts(reward_tokenizer, min(known, len(reward_tokenizer)))
    same = {text: i for i, text in reversed(list(enumerate(theirs))) if text}
    cuts: list[tuple[int, ...]] = [(same[text],) if text in same else () for text in texts]
    rest = [i for i, text in enumerate(texts) if text and not cuts[i]]
    (before,) = encode([_BEFORE])
    behind = encode([_BEFORE + texts[i] for i in rest])
    # Where a token reaches over the beginning, the text is cut alone.
    apart = [i for i, ids in zip(rest, behind, strict=True) if ids[: len(before)] != before]
    found = {i: ids[len(before) :] for i, ids in zip(rest, behind, strict=True)}
    found |= dict(zip(apart, encode([texts[i] for i in apart]), strict=True))
    for i, ids in found.items():
        cuts[i] = tuple(token for token in ids if token < known)
    return cuts


def _texts(tokenizer: Any, size: int) -> list[str]:
    """What each token adds to a text; "" for special tokens, holes of the vocabulary and parts of a character."""
    before = list(tokenizer(_BEFORE, add_special_tokens=False)["input_ids"])
    apart = set(tokenizer.all_special_ids)
    (start,) = tokenizer.batch_decode([before], skip_special_tokens=True)
    whole = tokenizer.batch_decode([[*before, i] for i in range(size)], skip_special_tokens=True)
    texts = [text[len(start) :] if text.startswith(start) else "" for text in whole]
    return ["" if i in apart or UNFINISHED in text else text for i, text in enumerate(texts)]


def _in_slots(weight: Tensor, cuts: Sequence[tuple[int, ...]], slots: int) -> Tensor:
    """Rows of ``weight`` for each cut (V, slots * d): those of the first tokens, and the mean of the others."""
    size, width = len(cuts), weight.shape[1]
    table = weight.new_empty(size, slots, width)
    for first in range(0, size, _CHUNK):
        some = cuts[first : first + _CHUNK]
        for slot in range(slots):
            own = [cut[slot:] if slot == slots - 1 else cut[slot : slot + 1] for cut in some]
            ids = torch.tensor([i for part in own for i in part], dtype=torch.long, device=weight.device)
            starts = torch.tensor([0, *accumulate(map(len, own))][:-1], device=weight.device)
            places = torch.arange(len(ids), device=weight.device)
            means = embedding_bag(places, upcast(weight[ids]), starts, mode="mean")
            table[first : first + len(some), slot] = means.to(weight.dtype)
    return table.view(size, slots * width)
