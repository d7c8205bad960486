"""One step of rollouts that is done by the device alone: forward pass, sampling, draft verification, ends.

Everything that a step reads and writes is in `SlotState`, whose tensors stay where they are, so that a step can be
captured in a graph. Of each slot it takes as many tokens as the draft has foreseen, and one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.graphs import Counts, Graphs
from nabla_fast.models import slots
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.rollout import draws

# Flags of a `Report`.
ENDED, DECLINED, UNREADABLE = 1, 2, 4
NO_TOKEN = -1


class SlotState(NamedTuple):
    """B slots of T columns.

    Attributes:
        kv: (L, 2, B, heads, T, head width) keys and values, of all tokens but the last.
        hidden: (B, T, d) last hidden states, of the same tokens.
        text: (B, T) int64 token ids of prompt and response.
        earlier: (B, T) int64 tokens that are expected in these columns; `NO_TOKEN` for none.
        length: (B,) int64 tokens in ``text``.
        prompt: (B,) int64 tokens of the prompt.
        end: (B,) int64 length at which the response ends in any case.
        seed: (B,) int64 see `draws.mixed`.
        following: (B,) bool, whether ``earlier`` has been right so far.
        ended: (B,) bool, whether a slot's response is complete, or the slot empty.
    """

    kv: Tensor
    hidden: Tensor
    text: Tensor
    earlier: Tensor
    length: Tensor
    prompt: Tensor
    end: Tensor
    seed: Tensor
    following: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, like: KVCache, count: int, columns: int) -> SlotState:
        """``count`` empty slots of ``columns`` columns for a model that makes caches ``like`` this one."""
        _, heads, _, width = like.keys[0].shape
        kv = like.keys[0].new_zeros(len(like.keys), 2, count, heads, columns, width)
        hidden = like.hidden.new_zeros(count, columns, like.hidden.shape[1])

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.long, device=kv.device)

        text, earlier = integers(count, columns), integers(count, columns, value=NO_TOKEN)
        # What an empty slot computes is one token, over and over.
        length, prompt = integers(count, value=1), integers(count, value=1)
        end, seed = integers(count, value=2), integers(count)
        ended = torch.ones(count, dtype=torch.bool, device=kv.device)
        return cls(kv, hidden, text, earlier, length, prompt, end, seed, torch.zeros_like(ended), ended)

    @property
    def size(self) -> int:
        """B."""
        return len(self.ended)

    @property
    def columns(self) -> int:
        """T."""
        return self.text.shape[1]

    @property
    def example(self) -> KVCache:
        """A cache of no tokens, like those that slots are for."""
        keys, values = (self.kv[:, part, :1, :, :0].unbind() for part in (0, 1))
        return KVCache(keys, values, self.hidden[0, :0])

    def first(self, count: int) -> SlotState:
        """The first slots; views."""
        return SlotState(self.kv[:, :, :count], *(x[:count] for x in self[1:]))

    def take_over(self, other: SlotState) -> None:
        """Copies all slots of a smaller state."""
        count, columns = other.size, other.columns
        self.kv[:, :, :count, :, :columns].copy_(other.kv)
        for own, theirs in zip(self[1:], other[1:], strict=True):
            own[:count, :columns].copy_(theirs) if own.ndim > 1 else own[:count].copy_(theirs)

    def clear(self) -> None:
        """Empties all slots, of what a model that gave NaN may have left in them, too: zero times NaN is NaN."""
        self.kv.zero_()
        self.hidden.zero_()
        self.length.fill_(1)
        self.following.fill_(False)
        self.ended.fill_(True)

    def move(self, source: int, target: int) -> None:
        """Copies a slot to another, and empties it."""
        self.kv[:, :, target].copy_(self.kv[:, :, source])
        for x in self[1:]:
            x[target].copy_(x[source])
        self.ended[source] = True

    def put(
        self, slot: int, cache: KVCache, text: list[int], prompt: int, end: int, seed: int, expected: list[int]
    ) -> None:
        """Begins a rollout in a slot.

        Args:
            cache: of all tokens of ``text`` but the last.
            text: prompt and response.
            prompt: tokens of the prompt.
            end: longest ``text``.
            seed: see `draws.mixed`.
            expected: tokens that are expected to follow.
        """
        slots.write(self.kv, slot, cache)
        self.hidden[slot, : len(cache)].copy_(cache.hidden)
        both = torch.full((2, self.columns), NO_TOKEN, dtype=torch.long)
        both[0, : len(text)] = torch.tensor(text)
        both[1, len(text) : len(text) + len(expected)] = torch.tensor(expected, dtype=torch.long)
        known, expect = both.to(self.text.device)
        self.text[slot].copy_(known)
        self.earlier[slot].copy_(expect)
        self.length[slot], self.prompt[slot], self.end[slot] = len(text), prompt, end
        self.seed[slot] = draws.mixed(seed)
        self.following[slot], self.ended[slot] = bool(expected), False

    def expect(self, slot: int, begin: int, tokens: list[int]) -> None:
        """``tokens`` are expected from column ``begin`` on, and nothing behind them."""
        row = torch.tensor([*tokens, NO_TOKEN])[: self.columns - begin]
        self.earlier[slot, begin : begin + len(row)].copy_(row.to(self.earlier.device))
        self.following[slot] = True

    def set(self, slot: int, length: int, token: int) -> None:
        """The text of a slot is ``length`` tokens long, and this is the last of them."""
        self.text[slot, length - 1] = token
        self.length[slot] = length
        self.ended[slot] = False

    def result(self, slot: int, size: int, *, cache: bool) -> tuple[Tensor, KVCache | None]:
        """Hidden states (size, d) of a slot's first ``size`` columns, and the cache of them if it is asked for."""
        hidden = self.hidden[slot, :size].clone()
        return hidden, slots.read(self.kv, slot, size, hidden) if cache else None


@dataclass(frozen=True)
class Report:
    """What a step has done to one slot.

    Attributes:
        drafted: tokens of the draft that it verified.
        flags: `ENDED` if the response is complete; `DECLINED` if the next token has to be drawn by the host;
            `UNREADABLE` if the logits of the next token are NaN or infinite.
        tokens: that it took.
    """

    drafted: int
    flags: int
    tokens: list[int]

    @classmethod
    def of(cls, row: list[int]) -> Report:
        """From a row of what `step` returns."""
        taken, drafted, flags, *tokens = row
        return cls(drafted, flags, tokens[:taken])


def step(model: LanguageModel, sampling: Sampling, eos: Tensor, width: int, drafts: int, state: SlotState) -> Tensor:
    """Takes the next tokens of every slot that has not ended: one, and before it those of the draft that are right.

    Args:
        eos: (E,) int64 end tokens.
        width: K, tokens that each slot feeds: its last one, and a draft.
        drafts: most tokens of a draft, at most K - 1.
        state: is changed in place.

    Returns:
        (B, 3 + K) int64, see `Report.of`: how many tokens each slot took, how many its draft had, flags, the tokens.
    """
    steps = torch.arange(width, device=eos.device)
    at = (state.length - 1).unsqueeze(1) + steps
    # A draft token that would be fed in the last column could not be followed by another one.
    last = (state.end - 2).unsqueeze(1)
    expected = state.earlier.gather(1, at + 1)
    draft = expected[:, :-1]
    usable = (draft != NO_TOKEN) & (at[:, 1:] <= last) & (steps[1:] <= drafts) & state.following.unsqueeze(1)
    ids = torch.cat([state.text.gather(1, at[:, :1]), draft.masked_fill(~usable, 0)], dim=1)
    hidden = slots.run(model.backbone, state.kv, at, torch.minimum(at, last), ids)
    state.hidden.scatter_(1, at.unsqueeze(-1).expand_as(hidden), hidden)
    logits = model.logits(hidden.flatten(0, 1))
    low, high = draws.words(state.seed.unsqueeze(1), at + 1 - state.prompt.unsqueeze(1))
    drawn, wide = (x.view_as(at) for x in draws.draw(logits, sampling, low.flatten(), high.flatten()))
    readable = logits.amax(-1).isfinite().view_as(at)
    stops = (drawn.unsqueeze(-1) == eos).any(-1) | (at + 2 >= state.end.unsqueeze(1))
    right = usable & (drawn[:, :-1] == draft)
    goes_on = torch.cat([torch.ones_like(at[:, :1], dtype=torch.bool), right & ~stops[:, :-1]], dim=1)
    running = ~state.ended
    reached = goes_on.long().cumprod(1).bool() & running.unsqueeze(1)
    taken = (reached & readable & ~wide).long().cumprod(1).bool()
    count = taken.sum(1)
    state.text.scatter_(1, at + 1, torch.where(taken, drawn, state.text.gather(1, at + 1)))
    state.ended.logical_or_((taken & stops).any(1))
    state.following.logical_and_(~(taken & (drawn != expected)).any(1))
    state.length.add_(count)
    nothing = running & (count == 0)
    unreadable = ~readable[:, 0]
    flags = ENDED * state.ended.long() + nothing * (DECLINED + (UNREADABLE - DECLINED) * unreadable.long())
    return torch.cat([torch.stack([count, usable.sum(1), flags], dim=1), drawn], dim=1)


class Slots:
    """Slots with the graphs of steps over them. They outlast a stream, and serve one at a time.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.graphs = Graphs(device)
        self.state: SlotState | None = None
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def begin(self, model: LanguageModel, counts: Counts) -> None:
        """A stream begins, with empty slots; see `Graphs.begin`."""
        own = model.model
        self.graphs.begin((*own.parameters(), *own.buffers(), model.head.weight), counts)
        if self.state is not None:
            self.state.clear()

    def reserve(self, like: KVCache, count: int, columns: int) -> None:
        """Makes room for ``count`` slots of ``columns`` columns, with what is in them now; ``like`` is any cache.

        Raises:
            torch.OutOfMemoryError: if there is none; what is there stays.
        """
        before = self.state
        if before is not None and before.size >= count and before.columns >= columns:
            return
        if before is not None:
            count, columns = max(count, before.size), max(columns, before.columns)
        # They hold the tensors that they were captured with.
        self.graphs.clear()
        larger = SlotState.empty(like, count, columns)
        if before is not None:
            larger.take_over(before)
        self.state = larger

    def step(
        self, model: LanguageModel, count: int, width: int, drafts: int, sampling: Sampling, eos: tuple[int, ...]
    ) -> Tensor:
        """`step` over the first ``count`` slots, by its graph."""
        assert self.state is not None
        if eos not in self._ends:
            self._ends[eos] = torch.tensor(eos, dtype=torch.long, device=model.device)

        def run(end_tokens: Tensor, *state: Tensor) -> Tensor:
            return step(model, sampling, end_tokens, width, drafts, SlotState(*state))

        arguments = (self._ends[eos], *self.state.first(count))
        graph = self.graphs.get((count, width, drafts, sampling, eos), in_place=len(arguments))
        out: Tensor = graph(run, *arguments)
        return out
