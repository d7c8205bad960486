"""Draft tokens for speculative decoding, from earlier responses to the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# Longest end of a response that is looked up.
_LONGEST = 4
# First length of a draft that so many equal tokens lead to; one that proves right is followed by twice as many.
_FIRST_LENGTH = {1: 3, 2: 3, 3: 4, 4: 8}
# Tokens in a row that were the same in an earlier text, after which the next ones nearly always are.
_CERTAIN = 8


class Drafter:
    """Drafts the tokens that followed a response's last tokens in earlier text (prompt lookup).

    A rollout that begins where an earlier trajectory lay follows that one at first. After a mismatch, the longest end
    of the response that is found again leads on: in the earlier trajectories, at the position that is nearest, since
    noise belongs to positions; else in the prompt and the response itself, as late as possible.

    Args:
        prompt, response: where the rollout begins.
        earlier: whole responses to the same prompt, the one to follow first.
        most: longest draft, in tokens; with 0 there are none.
    """

    def __init__(
        self, prompt: Sequence[int], response: Sequence[int], earlier: Sequence[Sequence[int]], most: int
    ) -> None:
        self.most = most
        self._prompt = len(prompt)
        self._own: list[int] = []
        self._texts = [*earlier, self._own] if most else []
        # Tokens → (text, place behind them) wherever something follows them.
        self._index: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number in range(len(self._texts) - 1):
            for end in range(1, len(earlier[number])):
                self._remember(number, end)
        self._at: tuple[int, int] | None = None
        # Last tokens of the response that are known to be those of the text before `_at`.
        self._matched = 0
        for token in (*prompt, *response):
            self.add(token)
        if self._texts and earlier:
            self._at = 0, len(response)
        self._length = most
        self._drafted = False

    def add(self, token: int) -> None:
        """Appends ``token`` to the response."""
        if not self.most:
            return
        if self._at is not None:
            text, place = self._at
            self._at = (text, place + 1) if list(self._texts[text][place : place + 1]) == [token] else None
            self._matched += 1
        self._remember(len(self._texts) - 1, len(self._own))
        self._own.append(token)

    def draft(self, room: int, *, certain: bool = False) -> tuple[int, ...]:
        """At most ``room`` draft tokens; none where the last tokens occur nowhere else.

        Args:
            certain: whether there are none either unless the last `_CERTAIN` tokens have followed one text.
        """
        proved, self._drafted = self._drafted, False
        if not self.most or room < 1:
            return ()
        if self._at is None:
            self._look_up()
        elif proved:
            self._length = min(self.most, 2 * self._length)
        if self._at is None or (certain and self._matched < _CERTAIN):
            return ()
        text, place = self._at
        self._drafted = True
        return tuple(self._texts[text][place : place + min(self._length, room)])

    def rest(self) -> tuple[int, ...]:
        """All tokens that followed, for a caller that verifies them piece by piece; none as in `draft`."""
        if self.most and self._at is None:
            self._look_up()
        if self._at is None:
            return ()
        text, place = self._at
        return tuple(self._texts[text][place:])

    def _look_up(self) -> None:
        own = len(self._texts) - 1
        position = len(self._own) - self._prompt
        for size in range(min(_LONGEST, len(self._own)), 0, -1):
            found = self._index.get(tuple(self._own[-size:]))
            if found:
                # Earlier trajectories count from the start of the response, as their noise does.
                others = [(abs(place - position), text, place) for text, place in found if text != own]
                self._at = min(others)[1:] if others else found[-1]
                self._length = min(self.most, _FIRST_LENGTH[size])
                self._matched = size
                return

    def _remember(self, text: int, end: int) -> None:
        tokens = self._texts[text]
        for size in range(1, min(_LONGEST, end) + 1):
            self._index[tuple(tokens[end - size : end])].append((text, end))
