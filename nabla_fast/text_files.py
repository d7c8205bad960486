"""Reads files of one entry a line, as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(file: Path, option: str) -> list[tuple[int, str]]:
    r"""Numbers, from 1, and texts of the lines of ``file`` that are not blank; a line is what ``\n`` or ``\r\n`` ends.

    Args:
        file: UTF-8, with or without a byte order mark. A pipe is as good as a file.
        option: what named it, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if a line is not UTF-8; the message gives its number.
    """
    if not file.exists():
        raise FileNotFoundError(f"{option}: there is no file {file}")
    if file.is_dir():
        raise IsADirectoryError(f"{option}: {file} is a directory; name a file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OSError(f"{option}: {file} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{option}: line {number} of {file} is not UTF-8: {error.reason}; save it as UTF-8") from error
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, line) for number, line in lines if line.strip()]


def parse_json_line(file: Path, option: str, number: int, line: str) -> Any:
    """The JSON value that line ``number`` of ``file`` holds; its strings may hold control characters as they are.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, or has half of a surrogate pair, which is no text.
    """
    where = f"{option}: line {number} of {file}"
    try:
        value = json.loads(line, strict=False)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read as JSON") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair, {error.object[error.start]!a}, which is no text"
        ) from error
    return value
