"""The settings of the searches over steps, apart from them: the command line reads these without loading torch."""

from __future__ import annotations

from dataclasses import dataclass

from nabla_fast.config import require_int, require_number


@dataclass(frozen=True)
class SearchConfig:
    """Settings of the searches over steps that ∇-Reasoner is compared with (`nabla_fast.search`).

    Attributes:
        search_separator: a step ends with the token that completes it; white space that a step begins with does not
            count. Empty for steps of ``search_tokens`` tokens.
        search_tokens: longest step, in tokens.
        search_width: continuations of a partial response: M of beam search, and the children of a node of MCTS.
        exploration: MCTS's exploration constant, for rewards scaled to [0, 1].
    """

    search_separator: str = "\n"
    search_tokens: int = 64
    search_width: int = 4
    exploration: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.search_separator, str):
            raise TypeError(f"search_separator must be a string, got {self.search_separator!r}")
        require_int("search_tokens", self.search_tokens, minimum=1)
        require_int("search_width", self.search_width, minimum=1)
        require_number("exploration", self.exploration, minimum=0.0)
