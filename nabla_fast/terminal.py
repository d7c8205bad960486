"""Standard output and standard error of the command line: text appears as it is, in whatever encoding they have."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.text import Text

# Names, prompts and answers may hold "[/b]" or ":smile:"; what is styled is a `Text`.
OUT = Console(markup=False, emoji=False, highlight=False)
ERR = Console(markup=False, emoji=False, highlight=False, stderr=True)

# All but line feed and tab: a terminal would obey them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def tolerate_any_text() -> None:
    """Has both streams escape what their encoding lacks, instead of raising when an answer is to be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Prints plain data as JSON, with ``\\u`` escapes where the encoding of standard output needs them."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def status(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something without measurable progress runs."""
    return ERR.status(Text(f"{message} …"))


def plain(text: str) -> Text:
    """``text`` as it is, its control characters escaped."""
    return Text(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def print_error(message: str) -> None:
    """Prints what was wrong on stderr."""
    ERR.print(Text.assemble(("error: ", "red"), plain(message)), soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints on stderr what a user should know."""
    ERR.print(Text.assemble(("warning: ", "yellow"), plain(message)), soft_wrap=True)
