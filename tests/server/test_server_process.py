"""`nabla-fast serve` as a process: what a user starts, kills and starts again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import urllib3
from served import chat, wait_for
from typer.testing import CliRunner

import nabla_fast
from nabla_fast import cli
from nabla_fast.cli import serve
from nabla_fast.testing.models import save_pair

SECRET = "a-key-that-nobody-prints"
# Settings of requests that are to be under way when something happens: seconds of work, however few tokens.
LONG = {"nabla": {"max_iters": 1000, "gradient_threshold": None, "confidence_threshold": 1}}
FAST = ("--max-new-tokens", "8", "--max-rollouts", "2", "--max-iters", "2", "--seed", "3", "--device", "cpu")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def served(folders, port, log):
    """The process, when it answers."""
    models = ("--model", folders[0], "--reward-model", folders[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "nabla_fast", "serve", *models, "--port", str(port), *FAST],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", serve.API_KEY_VARIABLE: SECRET},
        )
    try:

        def healthy():
            assert process.poll() is None, log.read_text()
            try:
                return urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False).status == 200
            except urllib3.exceptions.HTTPError:
                return False

        wait_for(healthy, 120)
        yield process
    finally:
        process.kill()
        process.wait()


def ask(port, **more):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=SECRET, max_retries=0, timeout=60)
    return client.chat.completions.create(model="language_model", messages=chat("is it on"), **more)


def test_a_killed_server_starts_again_at_its_port_and_ends_in_peace(tmp_path):
    folders, port, log = save_pair(tmp_path), free_port(), tmp_path / "log"
    with served(folders, port, log) as process:
        first = ask(port)
        assert first.usage.nabla["seed"] == 3, "that of --seed"
        # In the middle of a stream, whose client is told by the connection.
        stream = ask(port, stream=True, n=8, extra_body=LONG)
        next(iter(stream))
        process.kill()
        process.wait()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    with served(folders, port, log) as process:
        assert ask(port).choices[0].message.content == first.choices[0].message.content
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(port, n=2, extra_body=LONG)))
        asking.start()

        def running():
            text = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
            return "nabla_fast_sequences_running 0.0" not in text

        wait_for(running)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        asking.join(10)
        assert len(answers[0].choices) == 2, "what was under way has ended"
    told = log.read_text()
    assert f"serving language_model at http://127.0.0.1:{port}/v1" in told
    assert SECRET not in told
    assert "Traceback" not in told


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing"),
        (("--port", 99999), "--port must be at most 65535, got 99999"),
        (("--timeout", 0), "--timeout must be above 0 and at most 86400, got 0.0"),
        (("--max-queue", -1), "--max-queue must be at least 0, got -1"),
        (("--api-key", "two words"), "--api-key cannot be a key; it must be printable ASCII"),
        (("--served-name", "a/"), "--served-name is 'a/'; give a name without a slash or a space at its ends"),
        (("--host", "no.such.host.invalid"), "--host is 'no.such.host.invalid', which is no address of this machine"),
    ],
    ids=str,
)
def test_a_wrong_option_is_told_before_models_are_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(serve, "_started", lambda *_, **__: pytest.fail("models were loaded"))
    result = invoke(*(("--pair", "arithmetic") if arguments else ()), *arguments)
    assert message in str(result.exception)


def test_a_port_that_is_taken_is_told(monkeypatch):
    monkeypatch.setattr(serve, "_started", lambda *_, **__: pytest.fail("models were loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("--pair", "arithmetic", "--port", taken.getsockname()[1])
    assert "127.0.0.1 does not give it (Address already in use); give another one" in str(result.exception)


def test_missing_libraries_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else object())
    assert 'serve needs fastapi, which is not installed; use pip install "nabla_fast[serve]"' in str(
        invoke("--pair", "arithmetic").exception
    )


def test_nothing_else_imports_the_servers_libraries():
    code = "import sys, nabla_fast.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fastapi", "uvicorn", "prometheus_client", "nabla_fast.server"} & set(done.stdout.split())
    package = Path(nabla_fast.__file__).parent
    for file in package.rglob("*.py"):
        if package / "server" not in file.parents and file != package / "cli" / "serve.py":
            assert not re.search(r"nabla_fast\.server|import (fastapi|uvicorn|prometheus)", file.read_text()), file
