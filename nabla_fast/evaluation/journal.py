"""A file of results, one JSON object a line, that survives whatever ends the process."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

Record = dict[str, Any]


def read_records(file: Path) -> list[Record]:
    """The complete lines of ``file``, in order; what follows the last newline was never finished and is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a complete line is not a JSON object; the message gives its number.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    return [_record(file, number, line) for number, line in enumerate(lines, start=1)]


def require_own_files(files: Iterable[Path]) -> None:
    """Raises ValueError if one of them is there and is no regular file: writing would change what a link points to."""
    for file in files:
        try:
            mode = file.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISLNK(mode):
            raise ValueError(
                f"{file} is a symbolic link to {os.readlink(file)}, and links are not written through; remove it, or "
                "give another directory"
            )
        if not stat.S_ISREG(mode):
            raise ValueError(f"{file} is not a regular file, so nothing is written to it; give another directory")


class Journal:
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
        """Writes a record and returns when it is on the disk.

        Raises:
            OSError: if it cannot be written; the message names the file.
        """
        # In one piece, so that no part of a line can follow another one.
        data = memoryview(_encoded(json.dumps(record, ensure_ascii=False, allow_nan=False)))
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

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_json(file: Path, value: Any) -> None:
    """Writes JSON as `write_file` does."""
    write_file(file, _encoded(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)))


def write_file(file: Path, data: bytes) -> None:
    """Writes ``data`` so that ``file`` holds either what it held before or all of it.

    Raises:
        ValueError: if ``file``, or the file of that name with ``.part``, is a link or no regular file.
    """
    part = part_of(file)
    require_own_files([file, part])
    part.unlink(missing_ok=True)  # of a run that was killed
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def part_of(file: Path) -> Path:
    """Where `write_file` writes what is not complete yet."""
    return file.with_name(f".{file.name}.part")


def _encoded(text: str) -> bytes:
    """A line of JSON; half of a surrogate pair, which UTF-8 cannot say, stands in it as JSON escapes it."""
    return (text + "\n").encode(errors="backslashreplace")


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
