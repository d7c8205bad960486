"""A client for vLLM's OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    TimeoutError,
)

from nabla_fast.config import Sampling, is_int, require_api_key, require_server_url
from nabla_fast.rollout.base import RolloutError, ServerLostError, StopRule
from nabla_fast.rollout.engine import Completion, TokenRequest
from nabla_fast.rollout.patience import bounded, interrupt, limited, pieces
from nabla_fast.sequence import Sequence

API_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds a server's key where none is given; vLLM's server takes its own from it, too."""

_TRANSIENT = (429, 500, 502, 503, 504)
# What is wrong with one request alone; anything else would meet every other one, too.
_OF_ONE_REQUEST = (400, 413, 422)
_KEY_WANTED = (401, 403)
_COMPLETIONS = "/v1/completions"
# Answers come in pieces so that silence is noticed and an answer can be given up; a piece per token would cost more.
_STREAM_INTERVAL = 8
_CLOSING_SECONDS = 1.0
# A list of models is there at once, or the address is that of something else.
_LISTING_SECONDS = 20.0
# Longest line of a stream and longest answer in one piece, which is the log-probabilities of the probe.
_MAX_LINE, _MAX_BODY = 2**20, 2**26

T = TypeVar("T")


class VLLMServer:
    """vLLM behind a URL. Requests run at once, in threads of their own, over connections that are kept.

    Args:
        url: such as ``http://127.0.0.1:8000``, with or without ``/v1`` behind it.
        model: which of the served models to ask; None asks the first that the server lists.
        api_key: sent as a bearer token where the server wants one; None takes the environment variable
            ``VLLM_API_KEY``. It is in no message.
        connect_timeout: seconds for a connection to be made.
        timeout: seconds in which the next tokens of an answer must come, time in the server's queue included. What
            takes longer is not asked for again.
        retries: further attempts at a request whose connection fails or that is answered with 429 or 5xx.
        backoff: seconds before the second further attempt (the first is made at once), doubled for each one after.
        concurrency: most requests on their way to the server; others wait here.

    Attributes:
        name, model, context_length: see `nabla_fast.rollout.engine.Engine`.

    Raises:
        ValueError: if ``url`` is none, or ``api_key`` cannot be one.
        RolloutError: if no vLLM answers there, or it does not serve ``model``.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        connect_timeout: float = 5.0,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        concurrency: int = 256,
    ) -> None:
        require_server_url("vllm_url", url)
        self.name = f"vllm_url {url!r}"
        name = "vllm_api_key"
        if api_key is None:
            # An empty environment variable is none.
            name, api_key = f"the environment variable {API_KEY_VARIABLE}", os.environ.get(API_KEY_VARIABLE) or None
        if api_key is not None:
            require_api_key(name, api_key)
        self._key = api_key
        self._path = (urllib3.util.parse_url(url).path or "").rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._attempts = 1 + retries
        self._backoff = backoff
        self._pool = urllib3.connection_from_url(
            url,
            maxsize=concurrency,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
        )
        self._pool.ConnectionCls = bounded(self._pool.ConnectionCls)
        self._slots = threading.BoundedSemaphore(concurrency)
        self.model, self.context_length = self._served(model)

    def open(self) -> ServerRequests:
        return ServerRequests(self)

    def log_probabilities(self, token_ids: Seq[int]) -> list[float]:
        """See `nabla_fast.rollout.engine.Engine`."""
        asked = Sequence(tuple(token_ids), (), 0, 1)
        request = TokenRequest.of(asked, (), Sampling(temperature=0.0), StopRule(frozenset()))
        answer = self._json("POST", _COMPLETIONS, {**self._body(request), "prompt_logprobs": 1})
        try:
            rows = answer["choices"][0]["prompt_logprobs"]
            return [float(rows[i][str(token)]["logprob"]) for i, token in enumerate(token_ids) if i]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._no_vllm("gave no prompt_logprobs") from error

    def complete(self, request: TokenRequest, requests: ServerRequests) -> Completion:
        """Sends a request until it is answered or no attempts are left.

        Raises:
            RolloutError: if there is none.
            _GivenUpError: if ``requests`` are closed meanwhile.
        """
        streaming = {"return_token_ids": True, "stream": True, "stream_interval": _STREAM_INTERVAL}

        def read(response: urllib3.BaseHTTPResponse) -> Completion:
            with requests.reading(response):
                return self._read(response, request.parameters["max_tokens"])

        return self._ask("POST", _COMPLETIONS, {**self._body(request), **streaming}, read, requests.require_open)

    def _body(self, request: TokenRequest) -> dict[str, Any]:
        return {"model": self.model, "prompt": list(request.prompt_ids), **request.parameters}

    def _read(self, response: urllib3.BaseHTTPResponse, most: int) -> Completion:
        """An answer of up to ``most`` tokens, from its server-sent events.

        Raises:
            HTTPError: if it is broken off.
            RolloutError: if it is none, or goes on where it must end.
        """
        tokens: list[int] = []
        finish = None
        for line in self._lines(response, tokens):
            name, _, data = line.strip().partition(b":")
            if name != b"data" or data.strip() == b"[DONE]":
                continue
            try:
                event = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"its answer is cut off: {line[:80]!r}") from error
            if not isinstance(event, dict) or "error" in event:
                raise ProtocolError(self._said(event))
            for choice in event.get("choices", ()):
                new = choice.get("token_ids") if isinstance(choice, dict) else None
                if not isinstance(new, list) or not all(map(is_int, new)):
                    raise self._no_vllm("returns no token_ids")
                tokens += new
                finish = choice.get("finish_reason") or finish
            if len(tokens) > most:
                raise RolloutError(f"{self.name} gave {len(tokens)} tokens and more where max_tokens is {most}")
        if finish not in ("stop", "length"):
            raise ProtocolError(f"its answer ends after {len(tokens)} tokens, finish_reason {finish}")
        return Completion(tuple(tokens), finish)

    def _lines(self, response: urllib3.BaseHTTPResponse, tokens: Seq[int]) -> Iterator[bytes]:
        """Lines of a stream, as long as there are more and more ``tokens``."""
        line, last = b"", len(tokens)
        silence = TimeoutError(f"no token for {self._timeout:g} s")
        with limited(self._timeout, partial(interrupt, response), silence) as postpone:
            for piece in pieces(response):
                *whole, line = (line + piece).split(b"\n")
                yield from whole
                if len(tokens) != last:
                    last = len(tokens)
                    postpone()
                if len(line) > _MAX_LINE:
                    raise self._no_vllm(f"sends a line of more than {_MAX_LINE} bytes")
        yield line

    def _served(self, wanted: str | None) -> tuple[str, int]:
        """The model to ask, and its context length."""
        answer = self._json("GET", "/v1/models", patience=min(self._timeout, _LISTING_SECONDS))
        try:
            lengths = {str(card["id"]): int(card["max_model_len"]) for card in answer["data"]}
            model = next(iter(lengths)) if wanted is None else wanted
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise self._no_vllm("lists no model with a max_model_len") from error
        if model not in lengths:
            raise RolloutError(
                f"{self.name} does not serve model {model!r}; it serves {', '.join(map(repr, lengths))}: give one of "
                "these as vllm_model"
            )
        return model, lengths[model]

    def _json(self, method: str, path: str, body: Any = None, patience: float | None = None) -> Any:
        data = self._ask(method, path, body, self._whole, patience=patience)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._no_vllm("answers with something other than JSON") from error

    def _whole(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """The body of an answer that comes in one piece."""
        data = bytearray()
        slow = TimeoutError(f"no whole answer for {self._timeout:g} s")
        try:
            with limited(self._timeout, partial(interrupt, response), slow):
                for piece in pieces(response):
                    data += piece
                    if len(data) > _MAX_BODY:
                        raise self._no_vllm(f"answers with more than {_MAX_BODY} bytes")
        finally:
            response.close()
            response.release_conn()
        return bytes(data)

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        read: Callable[[urllib3.BaseHTTPResponse], T],
        require_open: Callable[[], None] = lambda: None,
        patience: float | None = None,
    ) -> T:
        """Applies ``read`` to a response of status 200; retries errors that may be temporary."""
        timeout = urllib3.Timeout(connect=self._connect_timeout, read=patience or self._timeout)
        attempt = 0
        while True:
            attempt += 1
            require_open()
            try:
                response = self._pool.request(
                    method,
                    self._path + path,
                    json=body,
                    timeout=timeout,
                    preload_content=False,
                    redirect=False,
                    retries=False,
                )
                if response.status == 200:
                    return read(response)
                failed = self._refusal(response.status, path, self._whole(response))
                again = response.status in _TRANSIENT
            except HTTPError as error:
                require_open()
                failed = self._lost(error, attempt, patience or self._timeout)
                again = not isinstance(error, TimeoutError) or isinstance(error, NewConnectionError)
            if not again or attempt == self._attempts:
                raise failed
            if attempt > 1:
                sleep(self._backoff * 2 ** (attempt - 2))

    def _refusal(self, status: int, path: str, body: bytes) -> RolloutError:
        """The error for a response of another status."""
        what = f"answers HTTP {status} to {path}"
        if status in _KEY_WANTED:
            advice = "another key" if self._key else "the server's key"
            what += f"; give {advice} as vllm_api_key, or in the environment variable {API_KEY_VARIABLE}"
            return ServerLostError(f"{self.name} {what}")
        try:
            said = self._said(json.loads(body))
        except (ValueError, RecursionError):
            return self._no_vllm(what)
        return (RolloutError if status in _OF_ONE_REQUEST else ServerLostError)(f"{self.name} {what}: {said}")

    def _lost(self, error: HTTPError, attempts: int, patience: float) -> ServerLostError:
        if isinstance(error, NewConnectionError):
            what = f"cannot be reached ({error.__cause__ or error})"
        elif isinstance(error, ConnectTimeoutError):
            what = f"cannot be reached (no connection within {self._connect_timeout:g} s)"
        elif isinstance(error, ReadTimeoutError):
            what = f"gave no sign of life for {patience:g} s"
        elif isinstance(error, TimeoutError):
            what = f"gave {error}"
        else:
            what = f"broke off ({self._without_key(str(error))})"
        return ServerLostError(
            f"{self.name} {what}, {attempts} attempt{'s' * (attempts > 1)}; it must be that of a running vLLM server"
        )

    def _no_vllm(self, what: str) -> RolloutError:
        return RolloutError(f"{self.name} {what}; it must be that of a vLLM server, 0.10.2 or later")

    def _said(self, answer: Any) -> str:
        """The message of an error in vLLM's or OpenAI's form."""
        if isinstance(answer, dict):
            inner = answer.get("error", answer)
            answer = inner.get("message", inner) if isinstance(inner, dict) else inner
        return self._without_key(str(answer))[:1000]

    def _without_key(self, text: str) -> str:
        # Some servers repeat the key that they refuse.
        return text.replace(self._key, "...") if self._key else text


class ServerRequests:
    """See `nabla_fast.rollout.engine.Requests`."""

    def __init__(self, server: VLLMServer) -> None:
        self._server = server
        self._answers: SimpleQueue[tuple[int, Completion | Exception]] = SimpleQueue()
        self._lock = threading.Lock()
        self._reading: set[urllib3.BaseHTTPResponse] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def send(self, key: int, request: TokenRequest) -> None:
        # Daemons: whoever gives up on a silent server should not have to wait for its time-out to leave Python.
        thread = threading.Thread(target=self._run, args=(key, request), name=f"vllm-{key}", daemon=True)
        self._threads = {other for other in self._threads if other.is_alive()} | {thread}
        thread.start()

    def wait(self, seconds: float | None = None) -> list[tuple[int, Completion]]:
        try:
            answers = [self._answers.get(timeout=seconds)]
        except Empty:
            return []
        answers += [self._answers.get_nowait() for _ in range(self._answers.qsize())]
        completions = []
        for key, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            completions.append((key, answer))
        return completions

    def close(self) -> None:
        """Cancels running requests by closing their connections, at which the server stops.

        Threads end at once, but for those that wait for a server that has said nothing yet: they end at its time-out.
        """
        with self._lock:
            self._closed = True
            for response in self._reading:
                interrupt(response)
        deadline = monotonic() + _CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    @contextlib.contextmanager
    def reading(self, response: urllib3.BaseHTTPResponse) -> Iterator[None]:
        """Within, `close` interrupts ``response``; behind, its connection is back in the pool, or closed."""
        try:
            with self._lock:
                self.require_open()
                self._reading.add(response)
            yield
        finally:
            with self._lock:
                self._reading.discard(response)
            response.close()
            response.release_conn()

    def require_open(self) -> None:
        if self._closed:
            raise _GivenUpError

    def _run(self, key: int, request: TokenRequest) -> None:
        try:
            with self._server._slots:
                self.require_open()
                answer: Completion | Exception = self._server.complete(request, self)
        except _GivenUpError:
            return
        except Exception as error:  # handed to the thread that waits
            answer = error
        self._answers.put((key, answer))


class _GivenUpError(Exception):
    """The requests were closed."""
