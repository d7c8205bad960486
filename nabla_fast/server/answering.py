"""One request, from the engine's events to its response."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from time import monotonic

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nabla_fast.server.asks import Accepted, Answer, Delta, Event, RequestError
from nabla_fast.server.engine import Engine
from nabla_fast.server.metrics import Metrics
from nabla_fast.server.protocol import Request
from nabla_fast.server.replies import DONE, Reply, sse

# Seconds between two looks at whether the client is still there.
_LOOK = 0.25


class _ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class Answering:
    """Has what a request ``asked`` decoded, and gives it up when its client leaves or ``timeout`` seconds are over."""

    def __init__(
        self, engine: Engine, metrics: Metrics, request: fastapi.Request, asked: Request, timeout: float
    ) -> None:
        self._engine, self._metrics, self._request, self._asked = engine, metrics, request, asked
        self._timeout, self._deadline = timeout, monotonic() + timeout
        # It grows as long as the client is slow, up to the whole answer: the engine waits for nobody.
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            # A loop that is closed has nobody who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = engine.submit(asked.ask, tell)

    async def response(self) -> Response:
        """The response: all answers at once, or a stream of text as it is committed.

        Raises:
            RequestError: if there are no answers; what goes wrong after a stream has begun is an event of it.
        """
        with contextlib.ExitStack() as ending:
            ending.callback(self._end)
            try:
                reply = Reply(self._asked, await self._accepted())
                if self._asked.ask.stream:
                    return _Stream(self._chunks(reply), ending.pop_all().close)
                answers = [event async for event in self._answers() if isinstance(event, Answer)]
            except _ClientLeftError:
                return Response(status_code=499)
        return JSONResponse(reply.whole(answers))

    async def _chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        answers = []
        try:
            for chunk in reply.first():
                yield chunk
            async for event in self._answers():
                if isinstance(event, Answer):
                    answers.append(event)
                yield reply.piece(event)
            for chunk in reply.last(answers):
                yield chunk
        except RequestError as error:
            yield sse(error.body())
            yield DONE
        except _ClientLeftError:
            return

    async def _accepted(self) -> int:
        event = await self._next()
        assert isinstance(event, Accepted)
        return event.prompt_tokens

    async def _answers(self) -> AsyncIterator[Delta | Answer]:
        missing = self._asked.ask.choices
        while missing:
            event = await self._next()
            assert isinstance(event, Delta | Answer)
            missing -= isinstance(event, Answer)
            yield event

    async def _next(self) -> Event:
        while self._events.empty():
            left = self._deadline - monotonic()
            if left <= 0:
                self._metrics.timeouts.inc()
                raise RequestError(
                    f"the request took longer than {self._timeout:g} s, which is the most (--timeout)",
                    code="timeout",
                    # OpenAI's client would ask again, and wait as long.
                    headers={"x-should-retry": "false"},
                    status=504,
                )
            with contextlib.suppress(asyncio.TimeoutError):
                event = await asyncio.wait_for(self._events.get(), min(left, _LOOK))
                break
            if await self._request.is_disconnected():
                raise _ClientLeftError
        else:
            event = self._events.get_nowait()
        if isinstance(event, RequestError):
            raise event
        return event

    def _end(self) -> None:
        """Gives up what is not complete."""
        if not self._ticket.ended:
            if monotonic() < self._deadline:
                self._metrics.cancelled.inc()
            self._engine.cancel(self._ticket)
        elif self._ticket.first_token is not None:
            self._metrics.first_token.observe(self._ticket.first_token - self._ticket.submitted)


class _Stream(StreamingResponse):
    """Calls ``on_end`` when all has been sent, and when the client has left."""

    def __init__(self, chunks: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
