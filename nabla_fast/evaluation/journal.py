"""A file of results, one JSON object a line, that survives whatever ends the process."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from nabla_fast.whole_files import json_line, require_own_files

Record = dict[str, Any]


def read_records(file: Path) -> list[Record]:
    """The complete lines of ``file``, in order; what follows the last newline was never finished and is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a complete line is not a JSON object; the message gives its number.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    return [_record(file, number, line) for number, line in enumerate(lines, start=1)]


class Journal(AbstractContextManager["Journal"]):
    """Appends to a file of results, for one process at a time.

    A line counts when its newline is on the disk: a line cut short by a kill is dropped when the file is opened again.

    Args:
        file: made if it is missing.
        check: looks at the records that are there and raises ValueError for those that have no place in this run. The
            file is then as it was.

    Attributes:
        records: every record of the file.

    Raises:
        BlockingIOError: if another process has the file open.
        ValueError: if a complete line is not a JSON object, or the file is a link.
    """

    def __init__(self, file: Path, check: Callable[[Sequence[Record]], None] | None = None) -> None:
        require_own_files([file])
        self.file = file
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._stream: BinaryIO = os.fdopen(os.open(file, flags, 0o666), "a+b", buffering=0)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records = read_records(file)
            if check is not None:
                check(self.records)
        except BlockingIOError as error:
            self._stream.close()
            raise BlockingIOError(f"--out: another process is writing to {file}; wait until it has finished") from error
        except ValueError:
            self._stream.close()
            raise
        self._stream.truncate(file.read_bytes().rfind(b"\n") + 1)

    def append(self, record: Record) -> None:
        """Writes a record and returns when it is on the disk; raises OSError, with the file's name, if it cannot."""
        # In one piece, so that no part of a line can follow another one.
        data = memoryview(json_line(record))
        try:
            while data:
                data = data[self._stream.write(data) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise OSError(f"{self.file} cannot be written to ({error.strerror}); what it holds is kept") from error
        self.records.append(record)

    def close(self) -> None:
        """Closes the file; another process may now write to it."""
        self._stream.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _record(file: Path, number: int, line: bytes) -> Record:
    try:
        value = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} of {file} is not JSON, so it is not a file of results: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"line {number} of {file} is not a result")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
