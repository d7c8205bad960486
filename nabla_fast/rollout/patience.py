"""Time limits on reading from a server that is silent or very slow."""

from __future__ import annotations

import builtins
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPException
from time import monotonic
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

_PIECE = 2**16


def pieces(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it comes. ``stream`` would wait for whole chunks, and read a chunk's size however long it is."""
    while piece := response.read1(_PIECE):
        yield piece


@contextlib.contextmanager
def limited(seconds: float, stop: Callable[[], None], error: Exception) -> Iterator[Callable[[], None]]:
    """Within, ``stop`` is called after so many seconds, and ``error`` raised; what is yielded begins them anew.

    A read has a time-out of its own, which a server that sends a byte now and then never exceeds.
    """
    over = threading.Event()
    deadline, expired = monotonic() + seconds, False

    def postpone() -> None:
        nonlocal deadline
        deadline = monotonic() + seconds

    def watch() -> None:
        nonlocal expired
        while (left := deadline - monotonic()) > 0:
            if over.wait(left):
                return
        expired = True
        stop()

    threading.Thread(target=watch, name="watching-a-server", daemon=True).start()
    try:
        yield postpone
    except (HTTPError, HTTPException, OSError):
        if expired:
            raise error from None
        raise
    finally:
        over.set()
    if expired:
        raise error


def bounded(kind: Any) -> Any:
    """A kind of connection whose answers' heads must come within the time-out, and not only each of their bytes."""

    class Bounded(kind):
        def getresponse(self) -> Any:
            def hang_up() -> None:
                with contextlib.suppress(OSError, AttributeError):
                    self.sock.shutdown(socket.SHUT_RDWR)

            with limited(self.timeout, hang_up, builtins.TimeoutError()):
                return super().getresponse()

    return Bounded


def interrupt(response: urllib3.BaseHTTPResponse) -> None:
    """Makes whoever reads from it stop; it may have come to its end in this very moment."""
    with contextlib.suppress(ValueError, RuntimeError, OSError):
        response.shutdown()
