"""Mathematics in a process of its own, which can be ended whatever it computes: math-verify's own limit is an alarm.

An alarm reaches the main thread alone, and not within one long operation on integers; and it goes off on a busy machine
before anything was computed, so that a right answer would be none. Limits here are of processor time. This file runs as
a script: a request is a line of JSON on standard input, its answer one on standard output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SECONDS = 5
"""Processor time that math-verify may take for one parse, or for each comparison of two answers."""
# Of a whole request, when the process is ended: 5 seconds of it may be one operation that nothing interrupts.
_HARD_SECONDS = 20
# For a process that computes nothing.
_WAIT_SECONDS = 600.0
# Importing math-verify is part of the first answer.
_START_SECONDS = 120.0


class MathProcess:
    """math-verify at work in another process, begun when it is needed and again when it is lost; for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def parse(self, text: str) -> str | None:
        """The answer that math-verify finds in ``text``, as text; None if none, or if it takes too long."""
        found = self._ask("parse", text)
        return None if found is None else str(found)

    def same(self, one: str, other: str) -> bool:
        """Whether the answers that two texts give are equal; not if it takes too long to tell."""
        return bool(self._ask("same", one, other))

    def _ask(self, *request: str) -> Any:
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()
            try:
                return self._answer(json.dumps(request).encode() + b"\n", _WAIT_SECONDS)
            except (OSError, TimeoutError, EOFError, ValueError):
                self._stop()
                return None
            except BaseException:
                # An interrupt: the answer, when it comes, would be taken for the next one's.
                self._stop()
                raise

    def _answer(self, request: bytes, seconds: float) -> Any:
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(request)
        stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            # The process writes a line at once.
            if not selector.select(seconds):
                raise TimeoutError
        line = stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _start(self) -> None:
        if self._owner == os.getpid():  # after a fork it is the parent's
            self._stop()
        command = [sys.executable, "-I", str(Path(__file__).resolve()), json.dumps([sys.path, _HARD_SECONDS])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._owner = os.getpid()
        try:
            self._answer(b'["ready"]\n', _START_SECONDS)
        except (OSError, TimeoutError, EOFError, ValueError) as error:
            self._stop()
            raise RuntimeError("the process that grades mathematics does not start; is math-verify whole?") from error

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


@functools.cache
def shared() -> MathProcess:
    """The one of this process."""
    return MathProcess()


def _serve() -> None:
    sys.path[:], hard_seconds = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import logging
    import resource

    import math_verify
    from math_verify.errors import TimeoutException

    def stop(signal_number: int, frame: Any) -> None:
        raise TimeoutException  # as math-verify's own alarm does, which it takes for no answer

    signal.signal(signal.SIGPROF, stop)
    logging.disable(logging.CRITICAL)
    parse = functools.lru_cache(256)(lambda text: math_verify.parse(text, parsing_timeout=None))
    for line in sys.stdin:
        what, *texts = json.loads(line)
        told: Any = True
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + hard_seconds, most))
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
        try:
            if what == "parse":
                found = parse(texts[0])
                # math-verify puts the text that it read after what it made of it.
                told = str(found[-1]) if found else None
            elif what == "same":
                told = bool(math_verify.verify(*map(parse, texts), timeout_seconds=None))
        except (Exception, TimeoutException):
            told = None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
