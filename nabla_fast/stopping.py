"""Signals that end a command, made exceptions, so that the terminal is restored and what is finished stays."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(BaseException):
    """The process was told to end, by the signal ``number``.

    No KeyboardInterrupt: for that, whatever signal it was, the command line's library has an exit code of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a command that the signal stopped."""
        return 128 + self.number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise `StoppedError` in the main thread, the first of them once.

    What follows is the way out, which only a SIGINT cuts short.
    """

    def stop(number: int, frame: Any) -> None:
        for other in _ENDING:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_IGN)
        raise StoppedError(number)

    with kept_handlers() as before:
        for number, handler in before.items():
            # Where a caller ignores it (nohup), it stays ignored.
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield


@contextmanager
def kept_handlers() -> Iterator[dict[signal.Signals, Any]]:
    """Puts back, at its end, what the signals that end a command were handled by; nothing outside the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
