"""The engine: one thread that owns the models and decodes all requests together."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import torch

from nabla_fast.config import NablaConfig
from nabla_fast.decoder import Observer
from nabla_fast.generate import Pair
from nabla_fast.sequence import Sequence
from nabla_fast.server.asks import Accepted, Answer, Ask, Delta, Event, RequestError
from nabla_fast.server.decoding import Lane, TokenIds, lane_config, make_sequences, read_prompt
from nabla_fast.server.text import TextStream, before_stop
from nabla_fast.stats import Stats

_LOG = logging.getLogger("nabla_fast.server")
# After these a GPU's context is lost, and every later pass would fail, too.
_FATAL = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


@dataclass(eq=False)
class Choice:
    """An answer in the making.

    Attributes:
        samples: its sequences, of which the one with the highest reward is the answer.
        text: of a single one that is streamed.
        running: samples that have not come to their end.
    """

    number: int
    samples: list[Sequence]
    text: TextStream | None
    running: int


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        tell: hears of every event, in the engine's thread.
        first_token: when the first of its tokens was committed.
        queued: whether there was no room when it came, and it has not begun since.
        prompts: token ids of each prompt, once they have been read.
        choices: those that are not complete.
        waiting: sequences that have not begun.
        ended: whether it is complete, failed or given up.
    """

    ask: Ask
    tell: Callable[[Event], None]
    submitted: float = field(default_factory=monotonic)
    first_token: float | None = None
    queued: bool = False
    prompts: list[TokenIds] = field(default_factory=list)
    choices: set[Choice] = field(default_factory=set)
    waiting: deque[Sequence] = field(default_factory=deque)
    ended: bool = False


class Engine(Observer):
    """Decodes requests as they come, in a thread of its own.

    Sequences of all requests begin in the order in which they came, as long as fewer than ``config.max_batch_size``
    are under way; those with the same settings share a batch (`Lane`), and the batches take turns.

    Args:
        pair: the models; from now on they are the thread's own.
        config: whose ``max_batch_size`` holds for all sequences together.
        max_queue: most requests that wait while no further sequence can begin.

    Attributes:
        totals: counters of all sequences so far, and ``committed_tokens``.
    """

    def __init__(self, pair: Pair, config: NablaConfig, max_queue: int) -> None:
        self.totals: Counter[str] = Counter()
        self._pair, self._room, self._max_queue = pair, config.max_batch_size, max_queue
        self._news = threading.Condition()  # reentrant: `drain` may come from a signal in the middle of `submit`
        self._inbox: list[Callable[[], None]] = []
        self._live: dict[Ticket, int] = {}
        self._end: float | None = None
        self._dead: BaseException | None = None
        # What follows is the thread's own.
        self._queue: deque[Ticket] = deque()
        self._lanes: dict[NablaConfig, Lane] = {}
        self._owners: dict[int, tuple[Ticket, Choice]] = {}
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="nabla-fast-engine", daemon=True)
        self._thread.start()

    # What any thread may call

    @property
    def alive(self) -> bool:
        """Whether requests are decoded."""
        return self._thread.is_alive() and self._dead is None

    @property
    def running(self) -> int:
        """Sequences that are under way."""
        return sum(len(lane.sequences) for lane in [*self._lanes.values()])

    @property
    def batches(self) -> int:
        """Batches that are under way."""
        return len(self._lanes)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        with self._news:
            return sum(ticket.queued for ticket in self._live)

    def submit(self, ask: Ask, tell: Callable[[Event], None]) -> Ticket:
        """Takes a request; ``tell`` hears of it from then on, last of a `RequestError` or the last `Answer`.

        Raises:
            RequestError: if the engine ends or has ended (503), or its queue is full (429).
        """
        with self._news:
            if self._end is not None:
                raise _ending()
            if not self.alive:
                raise RequestError(
                    "the engine has stopped after an error; the server must be started again", status=503
                )
            ticket = Ticket(ask, tell)
            ticket.queued = sum(self._live.values()) >= self._room
            if ticket.queued and self.waiting >= self._max_queue:
                raise RequestError(
                    f"the server is busy: {self._room} sequences are decoded and {self._max_queue} requests wait, "
                    "which is the most (--max-batch-size, --max-queue); try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                    status=429,
                )
            self._live[ticket] = ask.choices * ask.samples
            self._inbox.append(partial(self._prepare, ticket))
            self._news.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Gives a request up; one that has ended already is left alone."""
        with self._news:
            if ticket in self._live:
                self._inbox.append(partial(self._forget, ticket))
                self._news.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more requests; those there are get some seconds to end, then they fail."""
        with self._news:
            self._end = monotonic() + seconds
            self._news.notify()

    def close(self, patience: float = 10.0) -> None:
        """Ends the thread; what is under way fails."""
        self.drain(0.0)
        self._thread.join(patience)

    # The thread

    def _run(self) -> None:
        try:
            # A thread's own modes; see `nabla_fast.generate.run`.
            with torch.inference_mode(False), torch.no_grad():
                while self._round():
                    pass
            reason = _ending()
        except BaseException as error:
            _LOG.exception("the engine stops")
            self._dead = error
            reason = RequestError(f"the engine has stopped: {error or type(error).__name__}", status=500)
        with self._news:
            self._end = monotonic()
            left, self._live = [*self._live], {}
        for ticket in left:
            ticket.tell(reason)
        # Of an engine that has stopped after an error, nothing works any more perhaps.
        for lane in [] if self._dead else self._lanes.values():
            lane.close()
        self._lanes.clear()

    def _round(self) -> bool:
        """One step of every batch, and who comes and goes before it; False when it was the last."""
        with self._news:
            while not (self._inbox or self._live or self._end is not None):
                self._news.wait()
            came, self._inbox = self._inbox, []
            if self._end is not None and (monotonic() >= self._end or not self._live):
                return False
        for act in came:
            act()
        self._begin()
        for config, lane in [*self._lanes.items()]:
            self._step(config, lane)
        return True

    def _prepare(self, ticket: Ticket) -> None:
        """Reads the prompts of a request, and puts it into the queue."""
        try:
            ticket.prompts = [read_prompt(self._pair, ticket.ask, prompt) for prompt in ticket.ask.prompts]
        except Exception as error:
            self._fail(ticket, _refusal(error))
            return
        self._queue.append(ticket)
        ticket.tell(Accepted(sum(map(len, ticket.prompts))))

    def _open(self, ticket: Ticket) -> None:
        """Makes the sequences of a request. Not before they can begin: the reward model's view of a prompt is large."""
        for number, samples in enumerate(make_sequences(self._pair, ticket.ask, ticket.prompts)):
            streamed = ticket.ask.stream and len(samples) == 1
            text = TextStream(self._pair.tokenizer, ticket.ask.config.stop_strings) if streamed else None
            choice = Choice(number, samples, text, len(samples))
            for sample in samples:
                sample.index = next(self._numbers)
                self._owners[sample.index] = ticket, choice
            ticket.choices.add(choice)
            ticket.waiting.extend(samples)

    def _begin(self) -> None:
        """Begins sequences, in the order of their requests, as long as there is room."""
        room = self._room - self.running
        while self._queue and room > 0:
            ticket = self._queue[0]
            try:
                if not ticket.choices:
                    self._open(ticket)
                lane = self._lane(lane_config(ticket.ask.config))
                while ticket.waiting and room > 0:
                    lane.add(ticket.waiting.popleft())
                    room -= 1
            except Exception as error:
                self._fail(ticket, _refusal(error))
                continue
            with self._news:
                ticket.queued = False
            if not ticket.waiting:
                self._queue.popleft()

    def _lane(self, config: NablaConfig) -> Lane:
        """The batch of these settings."""
        if config not in self._lanes:
            # Each has a cache of its own: a share, so that many do not take many times the memory.
            share = config.gradient_cache_bytes // (1 + len(self._lanes))
            self._lanes[config] = Lane(self._pair, config.replace(gradient_cache_bytes=share), self)
        return self._lanes[config]

    def _step(self, config: NablaConfig, lane: Lane) -> None:
        """Takes a batch on, and closes it when it is empty."""
        try:
            finished = lane.step()
        except Exception as error:
            self._break(config, lane, error)
            return
        for sequence in finished:
            self._finish(sequence)
        if not lane.sequences:
            # With its gradient cache: what follows may never ask for these settings again.
            self._lanes.pop(config).close()

    def _break(self, config: NablaConfig, lane: Lane, error: Exception) -> None:
        """Ends a batch by an error of its models, with its requests and no others."""
        _LOG.error("%d sequences fail", len(lane.sequences), exc_info=error)
        tickets = {self._owners[s.index][0] for s in lane.sequences if s.index in self._owners}
        del self._lanes[config]
        lane.close(error)
        for ticket in tickets:
            self._fail(ticket, _failure(error))
        if isinstance(error, _FATAL) and not isinstance(error, torch.OutOfMemoryError):
            raise error

    # The decoder's observer

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        """Tells of a sequence's new text; see `nabla_fast.decoder.Observer`."""
        ticket, choice = self._owners[index]
        self.totals["committed_tokens"] += len(tokens)
        if len(choice.samples) > 1:
            return
        if ticket.first_token is None:
            ticket.first_token = monotonic()
        if choice.text is not None and (text := choice.text.add(tokens)):
            ticket.tell(Delta(choice.number, text))

    # Ends

    def _finish(self, sequence: Sequence) -> None:
        ticket, choice = self._owners.pop(sequence.index)
        self.totals.update(sequence.stats.counters())
        with self._news:
            self._live[ticket] -= 1
        choice.running -= 1
        if choice.running:
            return
        best = max(choice.samples, key=lambda sample: sample.current.reward)
        tokens, reason = best.current.tokens, best.stats.finish_reason
        text = str(self._pair.tokenizer.decode(tokens, skip_special_tokens=True))
        text = before_stop(text, ticket.ask.config.stop_strings)
        stats = Stats([sample.stats for sample in choice.samples]).totals
        ticket.first_token = ticket.first_token or monotonic()
        if ticket.ask.stream and (rest := text if choice.text is None else choice.text.end()):
            ticket.tell(Delta(choice.number, rest))
        ticket.choices.discard(choice)
        if not ticket.choices:
            self._remove(ticket)
        ticket.tell(Answer(choice.number, text, len(tokens), best.current.reward, reason or "stop", stats))

    def _fail(self, ticket: Ticket, error: RequestError) -> None:
        if not ticket.ended:
            self._forget(ticket)
            ticket.tell(error)

    def _forget(self, ticket: Ticket) -> None:
        """Takes out what is left of a request."""
        ticket.waiting.clear()
        if ticket in self._queue:
            self._queue.remove(ticket)
        samples = [sample for choice in ticket.choices for sample in choice.samples]
        for sample in samples:
            if self._owners.pop(sample.index, None) is not None:
                self.totals.update(sample.stats.counters())
        ticket.choices.clear()
        self._remove(ticket)
        config = lane_config(ticket.ask.config)
        lane = self._lanes.get(config)
        if lane is None:
            return
        try:
            for sample in lane.sequences.intersection(samples):
                lane.drop(sample)
        except Exception as error:
            # The batch is made anew without the sequence, which takes memory.
            self._break(config, lane, error)

    def _remove(self, ticket: Ticket) -> None:
        ticket.ended = True
        with self._news:
            self._live.pop(ticket, None)


def _refusal(error: Exception) -> RequestError:
    """An error of what was asked; of other kinds, those of the models."""
    if isinstance(error, (ValueError, TypeError)):
        return RequestError(re.sub(r"prompts\[\d+\]", "the prompt", str(error)))
    return _failure(error)


def _failure(error: Exception) -> RequestError:
    """An error of the models, which is not the client's."""
    told = " ".join(str(error).split()) or type(error).__name__
    return RequestError(f"the request failed: {told}", status=500)


def _ending() -> RequestError:
    return RequestError("the server is shutting down", headers={"Retry-After": "1"}, status=503)
