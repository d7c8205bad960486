"""Many requests, and what goes wrong: full queues, lost clients, slow ones, models that fail."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import urllib3
from served import CONFIG, Gate, chat, serving, tiny, wait_for

import nabla_fast as nf

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"max_rollouts": 20, "confidence_threshold": 1.0, "max_iters": 20}
"""Settings of a request that takes long: every token is optimized, and many rollouts are allowed."""


def body(stream=False, **more):
    return {"model": "tiny", "messages": chat("is it on"), "seed": 0, "stream": stream, **more}


def raw(data, more=""):
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}{more}Content-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def test_a_full_queue_refuses_and_goes_on(gate):
    config = CONFIG.replace(max_batch_size=1, max_rollouts=1)
    with serving(gate.models(), config, max_queue=1) as server, ThreadPoolExecutor(2) as clients:
        gate.shut()
        first = clients.submit(server.post, "/v1/chat/completions", body())
        assert gate.reached.wait(20)
        second = clients.submit(server.post, "/v1/chat/completions", body(seed=1))
        wait_for(lambda: server.engine.waiting == 1)
        assert server.metrics()["nabla_fast_requests_waiting"] == 1
        refused = server.post("/v1/chat/completions", body(seed=2))
        assert refused.status == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="1 sequences are decoded and 1 requests wait"):
            server.client().chat.completions.create(model="tiny", messages=chat("is"))
        gate.open.set()
        assert first.result().status == second.result().status == 200
        assert server.post("/v1/chat/completions", body(seed=2)).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_an_error(gate, stream):
    with serving(gate.models(), timeout=0.6) as server:
        gate.shut()
        answer = server.post("/v1/chat/completions", body(stream))
        if stream:
            events = [line.removeprefix("data: ") for line in answer.data.decode().split("\n\n") if line]
            assert answer.status == 200
            assert events[-1] == "[DONE]"
            error = json.loads(events[-2])["error"]
        else:
            assert answer.status == 504
            assert answer.headers["x-should-retry"] == "false"
            error = answer.json()["error"]
        assert error["type"] == "timeout_error"
        assert error["message"] == "the request took longer than 0.6 s, which is the most (--timeout)"
        gate.open.set()
        wait_for(lambda: server.engine.running == 0)
        metrics = server.metrics()
        assert metrics["nabla_fast_timed_out_requests_total"] == 1
        assert metrics["nabla_fast_cancelled_requests_total"] == 0
        assert server.post("/v1/chat/completions", body(max_tokens=1)).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_sequences_with_it(stream):
    """And no others: what runs beside it, in the same batch, is as it is alone."""
    with serving() as server, ThreadPoolExecutor(1) as clients:
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body(stream, n=3, nabla=LONG)).encode()
        leaving = socket.create_connection((host, int(port)))
        leaving.sendall(raw(data))
        wait_for(lambda: server.engine.running == 3)
        staying = clients.submit(server.post, "/v1/chat/completions", body(seed=9, nabla=LONG))
        wait_for(lambda: server.engine.running == 4)
        assert server.engine.batches == 1
        if stream:
            while b'"content": "' not in leaving.recv(65536).replace(b'"content": ""', b""):
                pass
        leaving.close()
        wait_for(lambda: server.metrics()["nabla_fast_cancelled_requests_total"] == 1)
        wait_for(lambda: server.engine.running <= 1)
        answer = staying.result().json()
        expected = nf.generate(*tiny(), "is it on", CONFIG.replace(seed=9, **LONG))
        assert answer["choices"][0]["message"]["content"] == expected.texts[0]
        assert answer["usage"]["nabla"]["rollouts"] == expected.stats.totals.rollouts
        # An answer is told a moment before its batch is closed.
        wait_for(lambda: server.engine.running == server.engine.batches == 0)


def test_a_client_that_does_not_read_holds_nobody_up():
    # A long name stands in every event, so that these are more than what is buffered on the way.
    name = "tiny" * 1000
    asked = body(True, n=4, model=name)
    with serving(send_buffer=4096, name=name) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        slow.connect((host, int(port)))
        data = json.dumps(asked).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        slow.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_for(lambda: server.engine.running)
        assert server.post("/v1/chat/completions", body(max_tokens=2, model=name)).status == 200
        # All of it is decoded, although it has not been sent.
        wait_for(lambda: server.engine.running == 0)
        assert server.metrics()["nabla_fast_time_to_first_token_seconds_count"] == 1
        received = b""
        while piece := slow.recv(65536):
            received += piece
        slow.close()
        whole = server.post("/v1/chat/completions", {**asked, "stream": False}).json()
    texts = dict.fromkeys(range(4), "")
    for line in received.decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    assert [texts[i] for i in range(4)] == [choice["message"]["content"] for choice in whole["choices"]]


def test_an_error_of_a_model_ends_the_requests_of_its_batch_alone(gate):
    with serving(gate.models(), CONFIG.replace(max_rollouts=1)) as server, ThreadPoolExecutor(2) as clients:
        gate.shut()
        gate.error = FloatingPointError("reward_model (x) gave a value or gradient that is NaN or infinite")
        failing = [clients.submit(server.post, "/v1/chat/completions", body(seed=i)) for i in range(2)]
        assert gate.reached.wait(20)
        gate.open.set()
        for failed in failing:
            assert failed.result().status == 500
            assert "reward_model (x) gave a value" in failed.result().json()["error"]["message"]
        gate.error = None
        assert server.post("/v1/chat/completions", body()).status == 200
        assert urllib3.request("GET", f"{server.url}/health").status == 200


def test_a_dead_engine_is_told(monkeypatch, gate):
    with serving(gate.models(), CONFIG.replace(max_rollouts=1)) as server, ThreadPoolExecutor(1) as clients:
        gate.shut()
        last = clients.submit(server.post, "/v1/chat/completions", body())
        assert gate.reached.wait(20)

        def die(*_):
            raise SystemError("a bug")

        monkeypatch.setattr(server.engine, "_finish", die)
        gate.open.set()
        assert last.result().status == 500
        assert "the engine has stopped: a bug" in last.result().json()["error"]["message"]
        assert urllib3.request("GET", f"{server.url}/health").status == 503
        assert server.post("/v1/chat/completions", body()).status == 503
        assert server.metrics()["nabla_fast_engine_up"] == 0


def test_a_mistake_of_the_server_is_told_in_the_same_form(monkeypatch):
    with serving() as server:
        monkeypatch.setattr("nabla_fast.server.app.read_request", lambda *_, **__: 1 / 0)
        answer = server.post("/v1/chat/completions", body())
    assert answer.status == 500
    assert answer.json()["error"]["message"] == "the server made a mistake: ZeroDivisionError"


def test_a_drain_lets_requests_end_and_takes_no_more(gate):
    with (
        serving(gate.models(), CONFIG.replace(max_rollouts=1, max_batch_size=1)) as server,
        ThreadPoolExecutor(2) as clients,
    ):
        gate.shut()
        first = clients.submit(server.post, "/v1/chat/completions", body())
        assert gate.reached.wait(20)
        waiting = clients.submit(server.post, "/v1/chat/completions", body(seed=1))
        wait_for(lambda: server.engine.waiting == 1)
        server.engine.drain(20.0)
        refused = server.post("/v1/chat/completions", body())
        assert (refused.status, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        gate.open.set()
        assert first.result().status == waiting.result().status == 200
        wait_for(lambda: not server.engine.alive)


def test_what_a_drain_does_not_wait_for_is_told(gate):
    with serving(gate.models(), CONFIG.replace(max_rollouts=1)) as server, ThreadPoolExecutor(1) as clients:
        gate.shut()
        cut = clients.submit(server.post, "/v1/chat/completions", body(n=2, model="best-of-n-2/tiny"))
        assert gate.reached.wait(20)
        server.engine.drain(0.0)
        gate.open.set()
        assert (cut.result().status, cut.result().json()["error"]["type"]) == (503, "server_error")


def test_metrics_count_what_was_done():
    with serving() as server:
        before = server.metrics()
        usage = server.post("/v1/chat/completions", body(n=2)).json()["usage"]
        after = server.metrics()
    names = ("generated_tokens", "model_calls", "gradient_evaluations", "cache_misses", "rollouts", "reward_calls")
    for name in names:
        counted = after[f"nabla_fast_{name}_total"] - before[f"nabla_fast_{name}_total"]
        assert counted == usage["nabla"][name] > 0
    assert after["nabla_fast_committed_tokens_total"] == usage["completion_tokens"]
    assert after["nabla_fast_time_to_first_token_seconds_count"] == 1
    assert after["nabla_fast_requests_total"] == 2, "the first look at the metrics, and the request"


def test_requests_of_other_settings_run_beside_each_other(gate):
    config = CONFIG.replace(max_rollouts=1)
    with serving(gate.models(), config) as server, ThreadPoolExecutor(3) as clients:
        gate.shut()
        held = [clients.submit(server.post, "/v1/chat/completions", body(temperature=t)) for t in (0.5, 0.7, 0.7)]
        wait_for(lambda: sum(server.engine._live.values()) == 3)
        gate.open.set()
        assert [answer.result().status for answer in held] == [200] * 3
        wait_for(lambda: server.engine.batches == 0)
        assert threading.active_count() < 60
