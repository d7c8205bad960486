"""The mapping between the vocabularies of the language model and the reward model, and whether both cut text alike."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.chat import encode
from nabla_fast.models.language_model import EmbeddingTable
from nabla_fast.models.tokenizer_facts import remembered
from nabla_fast.ops import upcast

MINIMUM_SHARE = 0.9
# What rules for cutting text differ in: case, digits, runs of spaces, line ends, punctuation, contractions, scripts,
# accents in both normal forms. Long, so that a difference in nothing but a text's first token weighs little.
_TEXTS = (
    "It's 7 o'clock; we'll have walked 12,345.67 metres by 10:30 - that isn't far, is it? Don't go (yet)!\n\n"
    "Compute 48 * 13 + 2006 = 2630 and x**2/4 <= 1e-5.  Two  spaces,\ta tab, and\r\na line end.   \n  Next: $4.20.",
    "def area(r):\n    return 3.14159 * r ** 2  # in m^2\n\n\nfor i in range(10):\n\tprint(f'{i:>3}', _x[i], 'a\\b')\n"
    'if (a != b && c->d) { return {"key": [1, 22, 333]}; } // https://example.org/a_b?c=d&e=%20f#G',
    "Ångström, cafe\u0301 and naïve façades cost 5 €; Привет, мир! 你好，世界。 مرحبا ١٢٣ "
    "こんにちは Ⅷ ½ x² \U0001f469\u200d\U0001f52c \ufb01n …“quoted” – done",
)
# Rows of tokens of the vocabulary, and how many tokens a row has.
_ROWS, _LENGTH = 8, 32


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


def agreement(tokenizer: Any, reward_tokenizer: Any, vocab_size: int, reward_vocab_size: int) -> Alignment:
    """`align`, and where vocabularies are `Alignment.close`, `require_same_tokenization`.

    What gives no warning is found out once for as long as both tokenizers are as they were.
    """

    def find() -> tuple[Alignment, bool]:
        found = align(tokenizer, reward_tokenizer, vocab_size, reward_vocab_size)
        if tokenizer is reward_tokenizer or not found.close:
            return found, not (found.close and found.unmatched)
        return found, require_same_tokenization(tokenizer, reward_tokenizer, found) and not found.unmatched

    what = ("agreement", vocab_size, reward_vocab_size)
    found, _ = remembered(tokenizer, reward_tokenizer, what, find, keep=lambda known: known[1])
    return replace(found, partner=found.partner.clone())


def require_same_tokenization(tokenizer: Any, reward_tokenizer: Any, alignment: Alignment) -> bool:
    """Compares how two aligned tokenizers split a sample of texts: fixed ones, and random tokens of the vocabulary.

    Vocabularies can agree token by token where the rules that cut text in front of them do not: ``AutoTokenizer`` puts
    a family's own pre-tokenizer in the place of the one that was saved with the checkpoint. The reward model would then
    read the prompt in other pieces than it was trained on, or without some of it, and its rewards would be wrong
    without a sign.

    Only what stands in the text counts: no BOS that a tokenizer adds, and no unknown token, which another tokenizer may
    leave out. Texts with a token that one of the two does not have are left out: `align` has told of those.

    Returns:
        Whether all of them are the same.

    Raises:
        ValueError: if fewer than 90 % of the sample's tokens are the same, as for vocabularies.

    Warns:
        UserWarning: if not all of them are, with a piece of text and both cuts of it.
    """
    partner = alignment.partner.tolist()
    known = set(partner)

    def cuts(text: str) -> tuple[list[int], list[int]] | None:
        ids, theirs = _cut(tokenizer, text), _cut(reward_tokenizer, text)
        ours = [partner[i] if i < len(partner) else -1 for i in ids]
        return None if -1 in ours or not known.issuperset(theirs) else (ours, theirs)

    def differ(text: str) -> bool:
        pair = cuts(text)
        return pair is not None and pair[0] != pair[1]

    texts = [*_TEXTS, *rows_of_tokens(tokenizer, [i for i, theirs in enumerate(partner) if theirs >= 0])]
    different = [text for text in texts if differ(text)]
    if not different:
        return True
    compared = [pair for pair in map(cuts, texts) if pair is not None]
    common = sum(block.size for pair in compared for block in SequenceMatcher(None, *pair, False).get_matching_blocks())
    share = 2 * common / sum(len(ours) + len(theirs) for ours, theirs in compared)
    piece = _shortened(min(different, key=len), differ)
    message = (
        f"tokenizer and reward_tokenizer cut text differently, though their vocabularies agree: of {piece!r} tokenizer "
        f"makes {_tokens(tokenizer, piece)} and reward_tokenizer {_tokens(reward_tokenizer, piece)} ({share:.1%} of a "
        "sample's tokens are the same); give two that cut alike (PreTrainedTokenizerFast.from_pretrained keeps a "
        "checkpoint's own rules where AutoTokenizer takes its family's)"
    )
    if share < MINIMUM_SHARE:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
    return False


def rows_of_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Random texts of some tokens of the vocabulary, special and added ones left out; the same ones every time."""
    apart = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = [i for i in ids if i not in apart]
    rng = random.Random(0)
    return [tokenizer.decode(rng.choices(words, k=_LENGTH)) for _ in range(_ROWS)] if words else []


def _cut(tokenizer: Any, text: str) -> list[int]:
    return [i for i in encode(tokenizer, text) if i != tokenizer.unk_token_id]


def _shortened(text: str, differ: Callable[[str], bool]) -> str:
    """The shortest piece of ``text``, by bisection, that is still split differently."""
    step = len(text) // 2
    while step:
        shorter = next((part for part in (text[:-step], text[step:]) if differ(part)), None)
        text = text if shorter is None else shorter
        step = step // 2 if shorter is None else min(step, len(text) // 2)
    return text


def _tokens(tokenizer: Any, text: str) -> str:
    return " ".join(map(repr, tokenizer.convert_ids_to_tokens(encode(tokenizer, text)))) or "nothing"
