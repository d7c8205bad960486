"""A client for vLLM's OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, ProtocolError, TimeoutError

from nabla_fast.rollout.base import RolloutError, ServerLostError
from nabla_fast.rollout.engine import Completion, TokenRequest

_TRANSIENT = (429, 500, 502, 503, 504)
_COMPLETIONS = "/v1/completions"
# Answers come in pieces so that silence is noticed and an answer can be given up; a piece per token would cost more.
_STREAM_INTERVAL = 8
_CLOSING_SECONDS = 1.0


class VLLMServer:
    """vLLM behind a URL. Requests run at once, in threads of their own, over connections that are kept.

    Args:
        url: such as ``http://127.0.0.1:8000``, with or without ``/v1`` behind it.
        model: which of the served models to ask; None asks the first that the server lists.
        api_key: sent as a bearer token where the server wants one.
        connect_timeout: seconds for a connection to be made.
        read_timeout: seconds without a sign of life within an answer, time in the server's queue included.
        retries: further attempts at a request whose connection fails or that is answered with 429 or 5xx.
        backoff: seconds before the second further attempt (the first is made at once), doubled for each one after.
        concurrency: most requests on their way to the server; others wait here.

    Attributes:
        name, model, context_length: see `nabla_fast.rollout.engine.Engine`.

    Raises:
        ValueError: if ``url`` is none.
        RolloutError: if no vLLM answers there, or it does not serve ``model``.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        concurrency: int = 256,
    ) -> None:
        self.name = f"vllm_url {url!r}"
        parsed = _parse(url, self.name)
        self._path = (parsed.path or "").rstrip("/").removesuffix("/v1")
        self._read_timeout = read_timeout
        self._pool = urllib3.connection_from_url(
            parsed.url,
            maxsize=concurrency,
            timeout=urllib3.Timeout(connect=connect_timeout, read=read_timeout),
            retries=urllib3.Retry(
                total=retries,
                backoff_factor=backoff,
                status_forcelist=_TRANSIENT,
                allowed_methods=None,  # a completion can be asked for twice: its seed is in the request
                raise_on_status=False,
                respect_retry_after_header=False,  # or the server would say how long we wait
            ),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )
        self._slots = threading.BoundedSemaphore(concurrency)
        self.model, self.context_length = self._served(model)

    def open(self) -> ServerRequests:
        return ServerRequests(self)

    def log_probabilities(self, token_ids: Sequence[int]) -> list[float]:
        """See `nabla_fast.rollout.engine.Engine`."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        answer = self._json("POST", _COMPLETIONS, json=body)
        try:
            rows = answer["choices"][0]["prompt_logprobs"]
            return [rows[i][str(token)]["logprob"] for i, token in enumerate(token_ids) if i]
        except (KeyError, IndexError, TypeError) as error:
            raise self._no_vllm("gave no prompt_logprobs") from error

    def complete(self, request: TokenRequest, requests: ServerRequests) -> Completion:
        """Asks until there is an answer or no attempt is left.

        Raises:
            RolloutError: if there is none.
            _GivenUpError: if ``requests`` are closed meanwhile.
        """
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            **request.parameters(),
            "return_token_ids": True,
            "stream": True,
            "stream_interval": _STREAM_INTERVAL,
        }
        retries: Any = self._pool.retries
        while True:
            response = self._answer("POST", _COMPLETIONS, json=body, retries=retries, preload_content=False)
            try:
                with requests.reading(response):
                    return self._read(response)
            except HTTPError as error:
                requests.require_open()
                try:
                    retries = (response.retries or retries).increment("POST", _COMPLETIONS, error=error)
                except MaxRetryError as spent:
                    raise self._lost(spent) from error
                retries.sleep()

    def _read(self, response: urllib3.BaseHTTPResponse) -> Completion:
        """An answer, from its server-sent events.

        Raises:
            HTTPError: if it is broken off.
        """
        tokens: list[int] = []
        finish = None
        for line in response:
            name, _, data = line.strip().partition(b":")
            if name != b"data" or data.strip() == b"[DONE]":
                continue
            try:
                event = json.loads(data)
            except ValueError as error:
                raise ProtocolError(f"its answer is cut off: {line[:80]!r}") from error
            if "error" in event:
                raise ProtocolError(_message(event))
            for choice in event.get("choices", ()):
                if choice.get("token_ids") is None:
                    raise self._no_vllm("returns no token_ids")
                tokens += choice["token_ids"]
                finish = choice.get("finish_reason") or finish
        if finish not in ("stop", "length"):
            raise ProtocolError(f"its answer ends after {len(tokens)} tokens, finish_reason {finish}")
        return Completion(tuple(tokens), finish)

    def _served(self, wanted: str | None) -> tuple[str, int]:
        """The model to ask, and its context length."""
        answer = self._json("GET", "/v1/models")
        try:
            lengths = {card["id"]: card["max_model_len"] for card in answer["data"]}
            model = next(iter(lengths)) if wanted is None else wanted
        except (KeyError, TypeError, StopIteration) as error:
            raise self._no_vllm("lists no model with a max_model_len") from error
        if model not in lengths:
            raise RolloutError(f"{self.name} does not serve model {model!r}; it serves {', '.join(map(repr, lengths))}")
        return model, int(lengths[model])

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._answer(method, path, **arguments)
        try:
            return response.json()
        except ValueError as error:
            raise self._no_vllm("answers with something other than JSON") from error

    def _answer(self, method: str, path: str, **arguments: Any) -> urllib3.BaseHTTPResponse:
        """An answer with status 200."""
        try:
            response = self._pool.request(method, self._path + path, **arguments)
        except HTTPError as error:
            raise self._lost(error) from error
        if response.status == 200:
            return response
        what = f"answers HTTP {response.status} to {path}"
        try:
            said = _message(response.json())
        except ValueError as error:
            raise self._no_vllm(what) from error
        lost = response.status in _TRANSIENT
        raise (ServerLostError if lost else RolloutError)(f"{self.name} {what}: {said}")

    def _lost(self, error: HTTPError) -> ServerLostError:
        reason: BaseException | None = error
        attempts = 1
        if isinstance(error, MaxRetryError):
            reason = error.reason
            total = self._pool.retries.total if isinstance(self._pool.retries, urllib3.Retry) else 0
            attempts += int(total or 0)
        if isinstance(reason, NewConnectionError):
            what = f"cannot be reached ({reason.__cause__ or reason})"
        elif isinstance(reason, TimeoutError):
            what = f"gave no sign of life for {self._read_timeout:g} s"
        else:
            what = f"broke off ({reason})"
        return ServerLostError(
            f"{self.name} {what}, {attempts} attempt{'s' * (attempts > 1)}; it must be that of a running vLLM server"
        )

    def _no_vllm(self, what: str) -> RolloutError:
        return RolloutError(f"{self.name} {what}; it must be that of a vLLM server, 0.10.2 or later")


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

    def wait(self) -> list[tuple[int, Completion]]:
        answers = [self._answers.get()]
        with contextlib.suppress(Empty):
            while True:
                answers.append(self._answers.get_nowait())
        completions = []
        for key, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            completions.append((key, answer))
        return completions

    def close(self) -> None:
        """Gives up what is under way: the server sees the connections break, and stops.

        Threads end at once, but for those that wait for a server that has said nothing yet: they end at its time-out.
        """
        with self._lock:
            self._closed = True
            for response in self._reading:
                _interrupt(response)
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


def _interrupt(response: urllib3.BaseHTTPResponse) -> None:
    # It may have come to its end in this very moment.
    with contextlib.suppress(ValueError, RuntimeError, OSError):
        response.shutdown()


def _message(answer: Any) -> str:
    """What an error in vLLM's or OpenAI's form says."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(answer)


def _parse(url: str, name: str) -> Any:
    accepted = f"{name} is not a URL; it must be like http://127.0.0.1:8000"
    try:
        parsed = urllib3.util.parse_url(url)
    except HTTPError as error:
        raise ValueError(accepted) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(accepted)
    return parsed
