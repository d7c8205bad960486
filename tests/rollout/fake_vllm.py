"""A server that speaks as much of vLLM's protocol as the client needs, backed by a tiny model; it fails on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from nabla_fast.config import Sampling
from nabla_fast.sampling import draw
from nabla_fast.testing.models import CONTEXT


@dataclass
class Answerer:
    """What vLLM would answer: tokens drawn by full forward passes of ``model``.

    Attributes:
        cap: most tokens of an answer, whatever is asked for; what vLLM does with a limit of the operator's.
        eos_token_ids: what ends an answer unless the request says ignore_eos.
        forced: tokens that come before those of the model.
    """

    model: Any
    tokenizer: Any
    cap: int = 10**6
    eos_token_ids: Sequence[int] = (3,)
    forced: Sequence[int] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tokens(self, prompt: Sequence[int], asked: dict[str, Any]) -> Iterator[tuple[int, str | None]]:
        """Each token, and why it is the last."""
        sampling = Sampling(asked["temperature"], asked["top_p"], asked["top_k"] or None)
        penalties = asked["presence_penalty"], asked["frequency_penalty"]
        assert not any((*penalties, asked["min_p"], asked["min_tokens"])), "this server does not know them"
        ends = {*asked["stop_token_ids"], *(() if asked["ignore_eos"] else self.eos_token_ids)}
        longest = min(asked["max_tokens"], self.cap)
        answer: list[int] = []
        while len(answer) < longest:
            if len(answer) < len(self.forced):
                answer.append(self.forced[len(answer)])
            else:
                ids = [*prompt, *answer]
                logits = penalised(self.logits(ids)[-1:], ids, asked["repetition_penalty"])
                answer.append(int(draw(logits, sampling, [(asked["seed"], len(answer))])))
            text = self.tokenizer.decode(answer, skip_special_tokens=asked["skip_special_tokens"])
            stopped = answer[-1] in ends or any(stop in text for stop in asked["stop"])
            finish = "stop" if stopped else "length" if len(answer) == longest else None
            yield answer[-1], finish
            if finish:
                return

    def log_probabilities(self, prompt: Sequence[int]) -> list[Any]:
        """As vLLM gives prompt_logprobs."""
        rows = self.logits(prompt).log_softmax(-1)
        after = [{str(token): {"logprob": float(rows[i, token])}} for i, token in enumerate(prompt[1:])]
        return [None, *after]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        # One at a time: the tests run on one thread, and answers must not depend on how they interleave.
        with self.lock, torch.no_grad():
            return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def penalised(logits: torch.Tensor, ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Logits (1, V) as vLLM's apply_repetition_penalties makes them, by the tokens of prompt and output."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, list(ids)] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class FakeVLLM:
    """The server, on a free port of 127.0.0.1, in threads of this process.

    Attributes:
        answerer: makes the answers.
        faults: what happens to the next completions instead, one each: an HTTP status; "silent", "cut" (the connection
            breaks after two tokens), "error" (an error within the stream), "no ids", "no json", or what never ends:
            "tokens", "pings", "line", and, a few bytes at a time, "chunk", "size" (of a chunk), "trailer", "head"; None
            for no fault. The last one stays where ``faulty_forever``.
        listing: what happens to requests for the list of models: "silent", "endless", "chunk", "head", or None.
        api_key: what requests must bring; None asks for nothing.
        defaults: parameters of sampling that a request gets where it names none, as from the model's own
            ``generation_config``.
        pause: seconds between two pieces of an answer.
        gate: completions wait for this before their first token.
        requests: the JSON of every completion asked for, attempts included.
        connections: how many were made.
        broken: set when the client has closed a connection within an answer.
        most_at_once: completions.
    """

    def __init__(self, answerer: Answerer, *, context_length: int = CONTEXT, served: Sequence[str] = ("tiny",)) -> None:
        self.answerer = answerer
        self.context_length = context_length
        self.served = served
        self.faults: list[Any] = []
        self.faulty_forever = False
        self.listing: str | None = None
        self.api_key: str | None = None
        self.defaults: dict[str, Any] = {}
        self.pause = 0.0
        self.gate: dict[tuple[int, ...], threading.Event] = {}
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.broken = threading.Event()
        self.closing = threading.Event()
        self.at_once = self.most_at_once = 0
        self.dead = False
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def next_fault(self) -> Any:
        with self.lock:
            if not self.faults:
                return None
            return self.faults[0] if self.faulty_forever and len(self.faults) == 1 else self.faults.pop(0)

    def die(self) -> None:
        """Breaks off every answer and listens no more."""
        self.dead = True
        self.closing.set()
        for gate in self.gate.values():
            gate.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_DRIPPED = {
    "chunk": (_HEAD + b"fffff\r\n", b"x"),
    "size": (_HEAD, b"0"),
    "trailer": (_HEAD + b"0\r\n", b"x: y\r\n"),
    "head": (b"HTTP/1.1 200 OK\r\n", b"x"),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Small pieces would otherwise wait for the client's acknowledgement of the piece before.
    disable_nagle_algorithm = True
    fake: FakeVLLM

    def setup(self) -> None:
        super().setup()
        with self.fake.lock:
            self.fake.connections += 1

    def log_message(self, *_: Any) -> None:
        pass

    def _admitted(self) -> bool:
        """Whether the request has the key; as some servers do, the answer repeats the one that it has."""
        wanted, sent = self.fake.api_key, self.headers.get("authorization", "")
        if wanted is None or sent == f"Bearer {wanted}":
            return True
        self._json({"error": f"Unauthorized: {sent}"}, 401)
        return False

    def do_GET(self) -> None:
        if self.fake.listing is not None:
            with contextlib.suppress(OSError):
                if self.fake.listing in _DRIPPED:
                    self._drip(*_DRIPPED[self.fake.listing])
                self._never_ends(self.fake.listing)
            self.close_connection = True
            return
        if not self._admitted():
            return
        if self.path != "/v1/models":
            self._json({"detail": "Not Found"}, 404)
            return
        cards = [{"id": name, "max_model_len": self.fake.context_length} for name in self.fake.served]
        self._json({"object": "list", "data": cards})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.fake.dead:
            self.close_connection = True
            return
        if not self._admitted():
            return
        asked = {**self.fake.defaults, **asked}
        if asked.get("prompt_logprobs") is not None:
            self._score(asked["prompt"])
            return
        fake = self.fake
        with fake.lock:
            fake.requests.append(asked)
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            self._complete(asked, fake.next_fault())
        except OSError:
            fake.broken.set()
            self.close_connection = True
        finally:
            with fake.lock:
                fake.at_once -= 1

    def _score(self, prompt: list[int]) -> None:
        answerer = self.fake.answerer
        beyond = [token for token in prompt if token >= answerer.model.config.vocab_size]
        if beyond:
            self._json({"error": {"message": f"Token id {max(beyond)} is out of vocabulary", "code": 400}}, 400)
            return
        self._json({"choices": [{"text": "", "prompt_logprobs": answerer.log_probabilities(prompt)}]})

    def _complete(self, asked: dict[str, Any], fault: Any) -> None:
        if fault in _DRIPPED:
            self._drip(*_DRIPPED[fault])
            return
        if fault == "silent":
            self.fake.closing.wait()
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._json({"error": {"message": "out of order", "code": fault}}, fault)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault in ("tokens", "pings", "line"):
            self._never_ends(fault)
        elif fault == "error":
            self._event({"error": {"message": "EngineCore encountered an issue", "code": 500}})
        else:
            self._answer(asked, fault)
            if self.close_connection:
                return
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _never_ends(self, kind: str) -> None:
        """Sends pieces until the client has enough, or nothing at all."""
        if kind == "endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        while not self.fake.closing.wait(0.001):
            if kind == "tokens":
                self._event({"choices": [{"index": 0, "text": "", "token_ids": [5], "finish_reason": None}]})
            elif kind == "pings":
                self._chunk(b": ping\n\n")
            elif kind in ("line", "endless"):
                self._chunk(b"x" * 2**16)
        self.close_connection = True

    def _drip(self, first: bytes, then: bytes) -> None:
        """Some bytes, and then others again and again."""
        self.wfile.write(first)
        while not self.fake.closing.wait(0.01):
            self.wfile.write(then)
        self.close_connection = True

    def _answer(self, asked: dict[str, Any], fault: Any) -> None:
        gate = self.fake.gate.get(tuple(asked["prompt"]))
        if gate is not None:
            gate.wait()
        if self.fake.dead:
            self.close_connection = True
            return
        for count, (token, finish) in enumerate(self.fake.answerer.tokens(asked["prompt"], asked), 1):
            choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": finish}
            if fault == "no ids":
                del choice["token_ids"]
            if fault == "no json":
                self._chunk(b"data: [1]\n\n")
            self._event({"choices": [choice]})
            if fault == "cut" and count == 2:
                self.close_connection = True
                return
            if self.fake.pause:
                self.fake.closing.wait(self.fake.pause)

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(answerer: Answerer, **options: Any) -> Iterator[FakeVLLM]:
    """A `FakeVLLM` for as long as the block runs."""
    fake = FakeVLLM(answerer, **options)
    try:
        yield fake
    finally:
        if not fake.dead:
            fake.die()
