"""Steps of a response: where they end, and one reward of the scores at their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLANK_LINE = "\n\n"


def _least(scores: Tensor) -> Tensor:
    # The gradient of `Tensor.amin` would be shared among equal ones.
    return scores.min(dim=0).values.exp()


AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # known to the command line, which has not loaded torch
    "min": _least,
    "product": lambda scores: scores.sum().exp(),
    "last": lambda scores: scores[-1].exp(),
    "mean": lambda scores: scores.exp().mean(),
}
"""One reward of the logarithms (k,) of a response's step scores, by name."""


@dataclass(frozen=True)
class ProcessReward:
    """A process reward model: a model that scores each step of a response. It is given in a reward model's place.

    The model gives logits for every token. They are read at the end of each step: at the separator behind it. Of
    several labels, the score is the softmax's probability of ``label``; of one, its sigmoid. The reward of a response
    is the scores' aggregation. A response that ends within a step has the separator put behind it and is read there. A
    step of nothing but white space is none.

    There are two kinds of separators. A text, such as a line break, is written by the language model: the score is
    read at the token of the response that completes it. A token of the reward model's own, such as Qwen's
    ``<extra_0>``, is put into the conversation that the reward model reads, behind each ``insert_after``; the response
    itself does not change, and no gradient is asked for these tokens.

    Where steps end is held constant in a gradient, as are tokens in general.

    Args:
        model: a transformers model in ``eval()`` whose forward pass gives logits (B, T, labels), such as an
            ``AutoModelForTokenClassification``.
        separator: what stands at the end of a step, as the model was trained with it: trl's default is a line break.
        aggregation: "min" (the gradient is that of the lowest step alone), "product" (summed as logarithms), "last" or
            "mean".
        insert_after: what ends a step in the language model's words, where the separator is a token that is inserted.
            None: a blank line if the separator is an added token of the reward tokenizer, else nothing is inserted.
        label: index of the label that means a right step; None takes the only one, or of two the one that its name
            says, else the second.
        values_prefixes: whether the model was trained to score every prefix, not only the ends of steps. A response
            that goes on (prefix rewards, ``proposal="guided"``) is then read at its last token as it is; otherwise a
            separator is put behind it, as if its step ended there.

    Raises:
        ValueError: for an unknown aggregation, or an empty text.
    """

    model: Any
    separator: str
    aggregation: str = "min"
    insert_after: str | None = None
    label: int | None = None
    values_prefixes: bool = False

    def __post_init__(self) -> None:
        require_aggregation(self.aggregation, "aggregation")
        for name, value in (("separator", self.separator), ("insert_after", self.insert_after)):
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} is {value!r}; give the text that ends a step, such as a line break")


def require_aggregation(name: str, argument: str) -> None:
    """Raises ValueError, naming ``argument``, for an aggregation that there is not."""
    if name not in AGGREGATIONS:
        raise ValueError(f"{argument} is {name!r}; use one of {', '.join(AGGREGATIONS)}")


def step_ends(pieces: Sequence[str], separator: str) -> tuple[list[int], bool]:
    """Where the steps of a text end.

    Whether a token ends a step depends on it and those before it alone.

    Args:
        pieces: the text of each token.

    Returns:
        The index of each token that completes a separator behind a step, and whether the text ends within a step. A
        text without any step is within its first.
    """
    ends: list[int] = []
    step = ""
    for i, piece in enumerate(pieces):
        step += piece
        # Of a step that is longer than the piece, only what the separator may begin in has to be searched.
        if separator in step[-len(piece) - len(separator) :]:
            before, _, step = step.rpartition(separator)
            if before.replace(separator, "").strip():
                ends.append(i)
    return ends, bool(step.strip()) or not ends
