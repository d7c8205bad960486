"""Checks that two tokenizers with the same vocabulary also split text into the same tokens.

Vocabularies can agree token by token where the rules that cut text in front of them do not: ``AutoTokenizer`` puts a
family's own pre-tokenizer in the place of the one that was saved with the checkpoint. The reward model would then read
the prompt in other pieces than it was trained on, or without some of it, and its rewards would be wrong without a sign.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from nabla_fast.models.chat import encode
from nabla_fast.models.vocabulary import MINIMUM_SHARE, Alignment

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


def require_same_tokenization(tokenizer: Any, reward_tokenizer: Any, alignment: Alignment) -> None:
    """Compares how two aligned tokenizers split a sample of texts: fixed ones, and random tokens of the vocabulary.

    Only what stands in the text counts: no BOS that a tokenizer adds, and no unknown token, which another tokenizer may
    leave out. Texts with a token that one of the two does not have are left out: `align` has told of those.

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
        return
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
