"""Rollouts in steps that the device does alone, each one replay of a captured graph.

The host launches a step before it reads what the one before has done. What it finds out so late (a stop string, a token
that it had to draw itself) takes back what the device has done since: noise belongs to positions, so that the tokens
are the same. Sequences join and leave between steps, each in a slot of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.graphs import CaptureError, Counts, bucket
from nabla_fast.models import checks, slots
from nabla_fast.models.graphed import head_settings
from nabla_fast.models.kept import Place, clear_graphs
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.sequence_cache import TOKENS_PER_PASS, extended
from nabla_fast.processors import GenerationSampler
from nabla_fast.rollout import draws
from nabla_fast.rollout.base import Rollout, RolloutStream, StopRule, no_rollout, unreadable
from nabla_fast.rollout.device_step import DECLINED, ENDED, UNREADABLE, Report, Slots, SlotState
from nabla_fast.rollout.drafts import Drafter
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

# Most slots; further sequences wait until one is free.
_SLOTS = 32
# Tokens that a slot may feed in one step: the last one, and a draft.
_WIDTHS = (1, 5, 9)
# Columns of the slots at first; twice as many where a sequence outgrows them.
_COLUMNS = 1024


def why_not(model: LanguageModel, sampler: Sampler, sampling: Sampling, stop: StopRule) -> str | None:
    """Why the device cannot draw rollouts alone with these settings, in one clause; None if it can.

    Whether the model can be run so is for `nabla_fast.models.slots.why_not` to say.
    """
    # A subclass may do anything.
    known = type(sampler).__call__ is Sampler.__call__ and type(sampler).processors in (
        Sampler.processors,
        GenerationSampler.processors,
    )
    if not known or sampler.names:
        return "logits processors are run by the host"
    if type(stop) is not StopRule:
        return f"a {type(stop).__name__} is asked by the host"
    return draws.why_not(sampling, model.vocab_size)


@dataclass(eq=False)
class Row:
    """A rollout in a slot.

    Attributes:
        sequence: what it continues.
        response: response tokens, as far as the host knows.
        drafter: guesses the tokens that follow.
        line: tokens that the device expects, from response position ``line_begin`` on.
        following: whether they have been right so far.
        slot: where it is; -1 before it has joined.
        version: a step that was launched for an earlier one has nothing to say.
        done: whether the rollout has been given back.
    """

    sequence: Sequence
    response: list[int]
    drafter: Drafter
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    line: list[int] = field(default_factory=list)
    line_begin: int = 0
    following: bool = False
    slot: int = -1
    version: int = 0
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.sequence.prompt_ids) + len(self.response)

    @property
    def end(self) -> int:
        """Length at which the response ends in any case; a rollout that has begun draws a token."""
        least = len(self.sequence.prefix) + 1
        return len(self.sequence.prompt_ids) + max(self.sequence.limit, least)

    @property
    def ahead(self) -> int:
        """Tokens that the device expects to follow."""
        return max(0, self.line_begin + len(self.line) - len(self.response)) if self.following else 0

    def add(self, token: int) -> None:
        place = len(self.response) - self.line_begin
        self.following = self.following and self.line[place : place + 1] == [token]
        self.response.append(token)
        self.drafter.add(token)

    def expect(self, tokens: Seq[int]) -> None:
        """The next tokens are expected to be these."""
        self.line, self.line_begin, self.following = list(tokens), len(self.response), bool(tokens)


class _Reading:
    """The reports of a step on their way to the host."""

    def __init__(self, out: Tensor, rows: Seq[Row]) -> None:
        self.rows = [(row, row.slot, row.version) for row in rows]
        self._event: Any = None
        if out.is_cuda:  # pragma: no cover - needs a GPU
            self._host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            self._host.copy_(out, non_blocking=True)
            # Of the model's device, which need not be the current one.
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(out.device))
        else:
            # The next step overwrites it.
            self._host = out.clone()

    def wait(self) -> list[tuple[Row, Report]]:
        """Of each row that nothing has happened to since."""
        if self._event is not None:  # pragma: no cover - needs a GPU
            self._event.synchronize()
        reports = self._host.tolist()
        return [(row, Report.of(reports[slot])) for row, slot, at in self.rows if not row.done and row.version == at]


class DeviceStream:
    """See `RolloutStream`. For models that `nabla_fast.models.slots` runs, and settings that `why_not` lets pass.

    Where a step cannot be captured or memory runs out, everything goes on in another stream, with a warning.

    Args:
        model: draws the tokens.
        sampler: draws those that the device cannot.
        draft_tokens: most draft tokens that one forward pass verifies.
        sampling, stop: see `RolloutBackend.open`.
        place: where the model's slots are between streams.
        counts: of captures, to add its own to.
        kernels: the context that forward passes run in.
        other: makes the stream that goes on with some rows.
    """

    def __init__(
        self,
        model: LanguageModel,
        sampler: Sampler,
        draft_tokens: int,
        sampling: Sampling,
        stop: StopRule,
        place: Place,
        counts: Counts,
        kernels: Callable[[], AbstractContextManager[Any]],
        other: Callable[[list[Row]], RolloutStream],
    ) -> None:
        self.model, self.sampler, self.draft_tokens = model, sampler, draft_tokens
        self.sampling, self.stop = sampling, stop
        self.waiting: list[Row] = []
        self.rows: list[Row] = []
        self.ended: list[tuple[Sequence, Rollout]] = []
        self._place, self._counts, self._kernels, self._make_other = place, counts, kernels, other
        self._eos = tuple(sorted(stop.eos_token_ids))
        self._asks = bool(stop.stop_strings or stop.criteria)
        self._slots: Slots | None = None
        self._under_way: _Reading | None = None
        self._other: RolloutStream | None = None

    def submit(self, sequence: Sequence) -> None:
        if self._other is not None:
            self._other.submit(sequence)
        elif self.stop.ended(sequence, sequence.prefix):
            self.ended.append((sequence, no_rollout(self.model.head.weight)))
        else:
            drafter = Drafter(sequence.prompt_ids, sequence.prefix, tuple(sequence.drawn), self.draft_tokens)
            self.waiting.append(Row(sequence, list(sequence.prefix), drafter))

    def collect(self, passes: int | None = None) -> list[tuple[Sequence, Rollout]]:
        left = range(passes) if passes is not None else itertools.count()
        # What is made here outlasts the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad(), self._kernels():
            try:
                for _ in left:
                    if self.ended or not (self.rows or self.waiting):
                        break
                    self._advance()
            except (CaptureError, torch.OutOfMemoryError) as error:
                self._go_on_elsewhere(error)
        ended, self.ended = self.ended, []
        return ended or (self._other.collect(passes) if self._other is not None else [])

    def drop(self, sequence: Sequence) -> None:
        if self._other is not None:
            self._other.drop(sequence)
        self.ended = [(other, rollout) for other, rollout in self.ended if other is not sequence]
        self.waiting = [row for row in self.waiting if row.sequence is not sequence]
        for row in [row for row in self.rows if row.sequence is sequence]:
            self._free(row)

    def close(self) -> None:
        if self._other is not None:
            self._other.close()
        if self._slots is not None:
            self._slots.graphs.end()
            self._place.leave(self._slots)
        self.waiting, self.rows, self._slots, self._under_way = [], [], None, None

    def _advance(self) -> None:
        if self.waiting and len(self.rows) < _SLOTS:
            self._join()
        launched = self._launch()
        before, self._under_way = self._under_way, launched
        if before is not None:
            self._read(before)

    # Joining and leaving

    def _join(self) -> None:
        model = self.model
        rows = self.waiting[: _SLOTS - len(self.rows)]
        known = [row.sequence.language_cache or model.new_cache(row.sequence.prompt_ids) for row in rows]
        # The last token goes through the model with the next step. Where it is the prompt's, once more.
        responses = [torch.tensor(row.response[:-1], dtype=torch.long) for row in rows]
        caches = extended(model.backbone, model.embedding, known, responses)
        if self._slots is None:
            self._slots = self._place.take(lambda: Slots(model.device))
            self._slots.begin(model, self._counts)
        count = 1 << (len(self.rows) + len(rows) - 1).bit_length()
        self._slots.reserve(caches[0], count, self._columns([*self.rows, *rows]))
        free = [slot for slot in range(count) if slot not in {row.slot for row in self.rows}]
        for row, slot, cache in zip(rows, free, caches, strict=False):
            row.expect(row.drafter.rest()[: self._state.columns - row.length])
            row.slot = slot
            prompt = row.sequence.prompt_ids
            self._state.put(
                slot,
                cache.crop(row.length - 1),
                [*prompt, *row.response],
                len(prompt),
                row.end,
                row.sequence.seed,
                row.line,
            )
        self.rows, self.waiting = [*self.rows, *rows], self.waiting[len(rows) :]

    @property
    def _state(self) -> SlotState:
        assert self._slots is not None
        assert self._slots.state is not None
        return self._slots.state

    def _columns(self, rows: Seq[Row]) -> int:
        """Columns of slots that have room for the next step, whatever the one under way does."""
        most = _WIDTHS[-1]
        needed = max(min(row.length + most, row.end) + most for row in rows)
        columns = _COLUMNS
        while columns < needed:
            columns *= 2
        return min(columns, bucket(max(row.end for row in rows) + most))

    def _leave(self, row: Row) -> None:
        """Gives back a rollout, and its slot."""
        size = row.length - 1
        tokens = torch.tensor(row.response[len(row.sequence.prefix) :], dtype=torch.long)
        hidden, cache = self._state.result(row.slot, size, cache=row.sequence.language_cache is not None)
        rollout = Rollout(tokens, hidden[size - len(tokens) :], cache, row.calls, row.drafted, row.accepted)
        self.ended.append((row.sequence, rollout))
        self._free(row)

    def _free(self, row: Row) -> None:
        """Takes a row out of its slot; a step that is under way with it is not read."""
        self._state.ended[row.slot] = True
        row.done = True
        self.rows.remove(row)

    # Steps

    def _launch(self) -> _Reading:
        assert self._slots is not None
        state = self._state
        # As few slots as may be: those above move down.
        least = 1 << (len(self.rows) - 1).bit_length()
        free = [slot for slot in range(least) if slot not in {row.slot for row in self.rows}]
        for row in self.rows:
            if row.slot >= least:
                state.move(row.slot, free[0])
                row.slot = free.pop(0)
        self._slots.reserve(state.example, least, self._columns(self.rows))
        room = TOKENS_PER_PASS.get(self.model.device.type, 1) // len(self.rows)
        widths = [width for width in _WIDTHS if width <= room] or [1]
        wanted = 1 + max(min(self.draft_tokens, row.ahead) for row in self.rows)
        width = next((width for width in widths if width >= wanted), widths[-1])
        out = self._slots.step(self.model, least, width, min(self.draft_tokens, width - 1), self.sampling, self._eos)
        return _Reading(out, self.rows)

    def _read(self, reading: _Reading) -> None:
        for row, report in reading.wait():
            if report.flags & UNREADABLE:
                raise unreadable(self.model.name, len(row.response))
            if report.flags & DECLINED:
                self._draw(row)
            else:
                self._take(row, report)
            if row.done or not self.draft_tokens:
                continue
            self._expect(row)

    def _take(self, row: Row, report: Report) -> None:
        """Takes the tokens of a step, up to the first that ends the response."""
        row.calls += 1
        row.drafted += report.drafted
        kept, ended = 0, bool(report.flags & ENDED)
        for token in report.tokens:
            row.add(token)
            kept += 1
            if self._asks and self.stop.ended(row.sequence, tuple(row.response)):
                ended = True
                break
        assert kept or ended, "a step left a rollout where it was, and did not say why"
        row.accepted += max(0, kept - 1)
        if ended:
            self._leave(row)

    def _draw(self, row: Row) -> None:
        """Draws the token that the device has declined to, by the sampler."""
        last = row.length - 1
        logits = self.model.logits(self._state.hidden[row.slot, last : last + 1])
        response = tuple(row.response)
        (token,) = self.sampler(logits, self.sampling, [row.sequence], [response]).tolist()
        row.add(token)
        row.calls += 1
        row.version += 1
        self._state.set(row.slot, row.length, token)
        if self.stop.ended(row.sequence, (*response, token)):
            self._leave(row)

    def _expect(self, row: Row) -> None:
        """Looks for tokens to expect where there are none, or not many.

        The step under way takes the first of them unseen.
        """
        if row.ahead > _WIDTHS[-1]:
            return
        rest = row.drafter.rest()[: self._state.columns - row.length]
        if len(rest) > max(1, row.ahead):
            row.expect(rest)
            self._state.expect(row.slot, row.length, row.line)

    def _go_on_elsewhere(self, error: Exception) -> None:
        """Hands all rollouts to another stream; it computes what their slots hold again."""
        reading, self._under_way = self._under_way, None
        if reading is not None:
            for row, report in reading.wait():
                if report.flags & UNREADABLE:
                    raise unreadable(self.model.name, len(row.response))
                if not report.flags & DECLINED:
                    self._take(row, report)
        rows, self.rows, self.waiting, self._slots = [*self.rows, *self.waiting], [], [], None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, CaptureError):
            self._place.refuse(reason[0])
        else:
            clear_graphs()
        checks.warn_once(self.model.model, f"{self.model.name} draws rollouts without graphs, slower: {reason[0]}")
        self._other = self._make_other(rows)


def stream(
    model: LanguageModel,
    sampler: Sampler,
    draft_tokens: int,
    sampling: Sampling,
    stop: StopRule,
    counts: Counts,
    kernels: Callable[[], AbstractContextManager[Any]],
    other: Callable[[list[Row]], RolloutStream],
) -> DeviceStream | None:
    """A `DeviceStream` where model and settings allow it, else None.

    Warns:
        UserWarning: once per model that cannot be run so, with the reason.
    """
    if model.backbone.cache_kind != "prefix" or why_not(model, sampler, sampling, stop) is not None:
        return None
    place = Place(model.model, "rollouts", *head_settings(model), model.backbone.fused)
    reason = slots.why_not(model.backbone) or place.refused
    if reason is not None:
        checks.warn_once(model.model, f"{model.name} draws rollouts without graphs, slower: {reason}")
        return None
    return DeviceStream(model, sampler, draft_tokens, sampling, stop, place, counts, kernels, other)
