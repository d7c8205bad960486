"""Guesses of how a response goes on, from the trajectory that it was changed from."""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the ends of a response that are looked for in the old one, the longest first.
_GRAMS = (3, 2, 1)


class Drafter:
    """Drafts what follows a response: what the old one has behind the tokens that both have in common.

    As long as the new response follows the old one, that is the next token of the old one. After a mismatch, the last
    tokens are looked up in it, those nearest to where the old one was left first.

    Args:
        response: where the rollout begins.
        old: what the old trajectory has from there on.
        most: longest draft, in tokens.
    """

    def __init__(self, response: Sequence[int], old: Sequence[int], most: int) -> None:
        self.begin = len(response)
        self.old = tuple(old)
        self.most = most
        self._next: int | None = 0  # of the old tokens
        self._seen = self.begin

    def __call__(self, response: Sequence[int]) -> tuple[int, ...]:
        """At most ``most`` tokens that may follow ``response``; none where there is nothing to go by."""
        if not self.most or not self.old:
            return ()
        for token in response[self._seen :]:
            at = self._next
            self._next = at + 1 if at is not None and self.old[at : at + 1] == (token,) else None
        self._seen = len(response)
        if self._next is None:
            self._next = self._find(response[self.begin :])
        return () if self._next is None else self.old[self._next : self._next + self.most]

    def _find(self, new: Sequence[int]) -> int | None:
        """Where the old tokens go on after what the new ones end with."""
        for size in _GRAMS:
            if len(new) < size:
                continue
            end = tuple(new[-size:])
            found = [i + size for i in range(len(self.old) - size + 1) if self.old[i : i + size] == end]
            if found:
                return min(found, key=lambda i: abs(i - len(new)))
        return None
