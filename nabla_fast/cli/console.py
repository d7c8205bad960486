"""Standard output and standard error of the command line: text appears as it is, in whatever encoding and width."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# Names, prompts and answers may hold "[/b]" or ":smile:"; what is styled is a `Text`.
OUT = Console(markup=False, emoji=False, highlight=False)
ERR = Console(markup=False, emoji=False, highlight=False, stderr=True)

# All but line feed and tab: a terminal would obey them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PACKAGE = str(Path(__file__).parents[1])


def tolerate_any_text() -> None:
    """Has both streams escape what their encoding lacks, instead of raising when an answer is to be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Lets what standard output would not take go nowhere, or Python tries to write it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(number: int, thing: str) -> str:
    """``number`` of a thing, in the plural where there is not one."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """Prints plain data as JSON, with ``\\u`` escapes where the encoding of standard output needs them."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def print_panel(title: str, text: str, *, console: Console = OUT) -> None:
    """Prints text in a frame."""
    console.print(Panel(plain(text), title=title, title_align="left"))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    text: Collection[str] = (),
    console: Console = OUT,
) -> None:
    """Prints rows under their columns or, where these are too wide for the terminal, every cell on a line of its own.

    Args:
        columns: the first one names the rows; a line feed breaks a name in two.
        text: columns of words besides the first one. Words may be wrapped, other cells are not, and nothing is cut.
    """
    console.print(Text(f"\n{title}", "italic"))
    words = {columns[0], *text}
    widths = [_least_width(cells, cells[0] in words) for cells in zip(columns, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > console.width:
        for name, *cells in rows:
            console.print(Text.assemble(f"{columns[0]} ", name, style="bold"), soft_wrap=True)
            for column, cell in zip(columns[1:], cells, strict=True):
                if cell:
                    console.print(Text.assemble("  ", column.replace("\n", " "), " ", cell), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        wraps = column in words
        table.add_column(column, justify="left" if wraps else "right", no_wrap=not wraps, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _least_width(cells: Sequence[str | Text], wraps: bool) -> int:
    """Columns of a terminal that cells need, of which the first is a heading."""
    pieces = [piece for cell in cells for piece in (str(cell).split() if wraps else str(cell).split("\n"))]
    return max(map(cell_len, pieces), default=0)


def status(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something without measurable progress runs."""
    return ERR.status(Text(f"{message} …"))


def counting_bars(*more: ProgressColumn) -> Progress:
    """Bars on stderr that tell how many are done, and in what time."""
    told = TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*told, *more, console=ERR)


def plain(text: str) -> Text:
    """``text`` as it is, its control characters escaped."""
    return Text(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def print_error(message: str) -> None:
    """Prints what was wrong on stderr."""
    ERR.print(Text.assemble(("error: ", "red"), plain(message)), soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints on stderr what a user should know."""
    ERR.print(Text.assemble(("warning: ", "yellow"), plain(message)), soft_wrap=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Within, warnings are printed in one line; what libraries tell programmers who call them is not."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        foreign = not filename.startswith(_PACKAGE)
        if not (foreign and issubclass(category, FutureWarning | DeprecationWarning)):
            print_warning(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
