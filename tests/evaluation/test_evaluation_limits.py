"""What would go on without end: graders, made-up problems, clusters that are none; and signals that end a run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_evaluation_cli import ENVIRONMENT, FAST, pair, problems  # noqa: F401

from nabla_fast.evaluation import math_process
from nabla_fast.evaluation.grading import MathGrader
from nabla_fast.evaluation.runner import RESULTS
from nabla_fast.evaluation.tasks import load_task
from nabla_fast.stopping import StoppedError, kept_handlers, stoppable


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it goes on and on"
    return found[0]


def test_grading_has_its_limit_in_every_thread(monkeypatch):
    monkeypatch.setattr(math_process, "_HARD_SECONDS", 3)
    math_process.shared()._stop()  # which had the limit from its start
    grader = MathGrader()
    grader.check("p", "12")

    def grade():
        began = time.monotonic()
        tower = grader.answer("p", "$9^{9^{9^{9}}}$")
        right = tower is not None and grader.right("p", "12", tower)
        return right, time.monotonic() - began

    for right, seconds in (in_a_thread(grade), grade()):
        assert not right
        assert seconds < 30
    assert grader.right("p", "12", grader.answer("p", "so $12$")), "the next answer is graded as ever"


def test_a_busy_machine_takes_no_time_from_a_grader():
    """Stopped for longer than math-verify may compute, which its own alarm would take for an answer that is none."""
    helper = math_process.MathProcess()
    assert helper.parse("$1$") == "1"
    found = []
    for ask in (lambda: helper.parse("$12$"), lambda: helper.same("$12$", "$\\frac{24}{2}$")):
        asking = threading.Thread(target=lambda ask=ask: found.append(ask()), daemon=True)
        os.kill(helper._process.pid, signal.SIGSTOP)
        asking.start()
        # It goes on for a moment, which is enough to begin, and is stopped again.
        time.sleep(0.1)
        os.kill(helper._process.pid, signal.SIGCONT)
        time.sleep(0.002)
        os.kill(helper._process.pid, signal.SIGSTOP)
        time.sleep(math_process.SECONDS + 1)
        os.kill(helper._process.pid, signal.SIGCONT)
        asking.join(60)
    helper._stop()
    assert found == ["12", True]


def test_a_grader_that_is_killed_is_begun_again():
    helper = math_process.MathProcess()
    assert helper.parse("$12$") == "12"
    helper._process.kill()
    helper._process.wait()
    assert helper.same("$12$", "$\\frac{24}{2}$")
    helper._stop()


@pytest.mark.parametrize("name", ["arithmetic", "reasoning_gym:gcd"])
def test_more_made_up_problems_than_anybody_wants_are_refused(name):
    with pytest.raises(ValueError, match=r"--max-problems is 1000000000; .* makes at most 100000"):
        load_task(name, max_problems=10**9)


def test_a_line_of_problems_is_what_a_newline_ends(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        "\ufeff".encode() + '{"prompt": "a\u2028b", "answer": "1"}\r\n{"prompt": "c", "answer": "2"}'.encode()
    )
    assert [p.chat[0]["content"] for p in load_task(str(file)).problems] == ["a\u2028b", "c"]
    file.write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"--task: line 2 of .*p.jsonl is not UTF-8"):
        load_task(str(file))


def test_an_address_without_a_cluster_is_told_at_once(monkeypatch):
    pytest.importorskip("ray")
    from nabla_fast.evaluation import ray_engine

    began = time.monotonic()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConnectionError, match=rf"--ray-address is '{address}', and no cluster is there: .*refused"):
            ray_engine._require_listener(address)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(ray_engine, "_HEALTH_SECONDS", 0.5)
    silent = pytest.raises(ConnectionError, match="something else listens, or it does not answer")
    with socket.create_server(("127.0.0.1", 0)) as other, silent:
        ray_engine._require_listener(f"127.0.0.1:{other.getsockname()[1]}")


def test_a_signal_is_an_exception_once_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)

    def stop_twice():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedError) as stopped, stoppable():
        stop_twice()
    assert stopped.value.number == signal.SIGTERM
    with kept_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_restores_the_cursor_and_keeps_what_is_finished(pair, problems, tmp_path, number, code):  # noqa: F811
    out = tmp_path / "a"
    command = [sys.executable, "-m", "nabla_fast", "eval", "--task", problems, "--n", "2", "--seeds", "0,1,2,3,4,5,6,7"]
    command += ["--out", str(out), *pair, *FAST]
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        ["nice", "-n", "5", *command],
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        # A shell has its background jobs ignore it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: read(terminal), b"")), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not (out / RESULTS).exists() or (out / RESULTS).read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(60) == code
    reader.join(10)
    text = b"".join(shown).decode(errors="replace")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0, "the cursor is hidden"
    assert "Traceback" not in text
    assert "the same command goes on from there" in " ".join(text.split())
    for line in (out / RESULTS).read_bytes().split(b"\n")[:-1]:
        assert json.loads(line)["error"] is None


def read(terminal):
    try:
        return os.read(terminal, 2**16)
    except OSError:
        return b""  # the other end is closed
