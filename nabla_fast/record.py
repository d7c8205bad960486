"""What an output keeps of each answer besides its text: always what its page needs, probabilities if asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.spelling import Piece, pieces, spelled
from nabla_fast.stats import Revision

NABLA = "∇-Reasoner"


@dataclass(frozen=True)
class TokenRecord:
    """What the language model thought at one position of an answer: of its own logits, at temperature 1.

    Attributes:
        probability: of the token that the answer has there.
        entropy: of the distribution, in nats.
        candidates: (token id, probability) of the likeliest tokens, the likeliest first.
        gradient_norm: ||G_t||_2 over the vocabulary, of the last gradient that was taken before the position was
            decided and with the tokens of that time; None where there was none.
    """

    probability: float
    entropy: float
    candidates: list[tuple[int, float]]
    gradient_norm: float | None


@dataclass(frozen=True)
class AnswerRecord:
    """What ``generate(record=True)`` keeps of an answer.

    Attributes:
        tokens: one entry per token.
        proposals: the probability of the old and of the new token of each of `SequenceStats.revisions`.
    """

    tokens: list[TokenRecord]
    proposals: list[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


@dataclass(eq=False, repr=False)
class Details:
    """What the page of an answer shows besides its text, reward and counters.

    The texts of tokens are made when they are first asked for, or when this is pickled, which leaves the tokenizer out.

    Attributes:
        chat: the prompt, as messages; empty where there were token ids alone.
        config: settings, without the key of a server.
        tokenizer: of the answer.
        tokens: (n,) ids of the answer.
        revisions: proposals made for it.
        record: probabilities, or None.
        samples: the rewards of all samples that the answer was chosen from; empty of one that was not.
        method: what found the answer.
    """

    chat: Sequence[Mapping[str, Any]]
    config: NablaConfig
    tokenizer: Any
    tokens: Sequence[int]
    revisions: Sequence[Revision] = ()
    record: AnswerRecord | None = None
    samples: Sequence[float] = ()
    method: str = NABLA

    def __post_init__(self) -> None:
        self.chat = [{"role": str(m["role"]), "content": m["content"] or ""} for m in self.chat]
        self.config = self.config.replace(vllm_api_key=None)  # an output is shown, and written to files

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The answer's tokens as text."""
        return pieces(self.tokenizer, self.tokens)

    @functools.cached_property
    def words(self) -> dict[int, str]:
        """Token id → its text alone, of the answer's tokens, its proposals and candidates."""
        ids = {*self.tokens, *(token for r in self.revisions for token in (r.old_token, r.new_token))}
        if self.record is not None:
            ids.update(token for entry in self.record.tokens for token, _ in entry.candidates)
        return {token: spelled(self.tokenizer, token) for token in sorted(ids)}

    def __getstate__(self) -> dict[str, Any]:
        made = {"pieces": self.pieces, "words": self.words}
        return {name: value for name, value in (self.__dict__ | made).items() if name != "tokenizer"}
