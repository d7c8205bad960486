"""Draws the results, and fills the tables of benchmarks/README.md and README.md from them.

    python benchmarks/plots.py            # every machine in benchmarks/results/
    python benchmarks/plots.py --check    # exit status 1 if a table does not say what the results say

A table stands between ``<!-- results: WHICH -->`` and ``<!-- end -->``. WHICH is a kind of machine (cpu or gpu) and a
suite, as in "cpu operators", with "in brief" behind it for a table of few rows and columns; or "improvements". A
machine's directory may hold several runs; of every case the newest one counts, and quick runs never do. Cases that were
never measured there are named below the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pictures
import torch
from cases import Setting
from run import chosen_cases
from tables import FORMAT, Record, brief, columns_and_rows, improvement_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENTS = (HERE / "README.md", HERE.parent / "README.md")
KINDS = ("cpu", "gpu")
SUITES = ("operators", "dto", "generate", "rollouts")
IMPROVEMENTS = "improvements"
NOT_MEASURED = "not measured"


def runs(directory: Path) -> list[dict[str, Any]]:
    """The runs in a machine's directory that count, oldest first."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(directory.glob("*.json"))]
    full = [run for run in found if run.get("format") == FORMAT and not run["quick"]]
    return sorted(full, key=lambda run: run["started"])


def newest_records(some: Sequence[dict[str, Any]]) -> list[Record]:
    """Of every case the newest record without an error."""
    records: dict[str, Record] = {}
    for run in some:
        for record in run["records"]:
            if "error" not in record:
                records[record["case"]] = record
    return list(records.values())


def machines(kind: str) -> dict[str, list[dict[str, Any]]]:
    """Machine → its runs, for CPUs or GPUs."""
    if not RESULTS.exists():
        return {}
    found = {directory.name: runs(directory) for directory in sorted(RESULTS.iterdir()) if directory.is_dir()}
    wanted = {name: [r for r in some if ("gpu" in r["machine"]) == (kind == "gpu")] for name, some in found.items()}
    return {name: some for name, some in wanted.items() if some}


def section(kind: str, suite: str, in_brief: bool = False, results: str = "results") -> str:
    """The Markdown of one suite on all machines of a kind, in a document from which ``results`` is the way there."""
    parts = []
    for name, some in machines(kind).items():
        records = newest_records(some)
        if not any(record["suite"] == suite for record in records):
            continue
        in_full = suite == "operators" and not in_brief
        columns, rows = brief(records) if suite == "operators" and in_brief else columns_and_rows(records, suite)
        parts.append(f"{described(name, some, suite, results)}\n\n{markdown(columns, rows)}")
        if not in_brief and (missing := lacking(kind, suite, records)):
            parts.append(f"Not measured there: {', '.join(f'`{case}`' for case in missing)}.")
        titles = pictures.PICTURES if in_full else (pictures.DECODE_PICTURE,) if suite == "generate" else ()
        parts += [f"![{title} on {name}]({results}/{name}/{title}.png)" for title in titles]
    return "\n\n".join(parts) or NOT_MEASURED


def lacking(kind: str, suite: str, records: Iterable[Record]) -> list[str]:
    """Cases of a suite of which there is no record."""
    measured = {record["case"] for record in records}
    return [name for name in case_names(kind, suite) if name not in measured]


@functools.cache
def case_names(kind: str, suite: str) -> list[str]:
    """The cases that `run.py` has for a kind of machine, whether it is this one or not."""
    setting = Setting(torch.device("cuda" if kind == "gpu" else "cpu"))
    return [case.name for case in chosen_cases(setting, [suite], None)]


def improvements() -> str:
    """The Markdown of results/improvements.json: what was made faster, and the commands that measure it again."""
    file = RESULTS / f"{IMPROVEMENTS}.json"
    found = [one for one in json.loads(file.read_text()) if not one["quick"]] if file.exists() else []
    if not found:
        return NOT_MEASURED
    commands = "\n".join(dict.fromkeys(one["command"] for one in found))
    return f"{markdown(*improvement_rows(found))}\n\n```sh\n{commands}\n```"


def described(name: str, some: Sequence[dict[str, Any]], suite: str, results: str) -> str:
    """The machine, and the files behind a table with the commits that they measured."""
    behind = [run for run in some if any(record.get("suite") == suite for record in run["records"])]
    last = behind[-1]
    machine = last["machine"].get("gpu", {}).get("name") or f"{last['machine']['processor']}, {last['threads']} threads"
    files = ", ".join(f"`{results}/{name}/{run['file']}` at {run['commit']}" for run in behind)
    return f"{machine}, torch {last['versions']['torch']} ({files}):"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    # A bare star would begin emphasis.
    return "\n".join("| " + " | ".join(cell.replace("*", "\\*") for cell in line) + " |" for line in lines)


def filled(text: str, results: str = "results") -> str:
    """``text`` with the tables that its markers name; ``results`` is the way from it to benchmarks/results."""

    def fill(match: re.Match[str]) -> str:
        kind, _, suite = match["which"].removesuffix(" in brief").partition(" ")
        if match["which"] == IMPROVEMENTS:
            table = improvements()
        elif kind in KINDS and suite in SUITES:
            table = section(kind, suite, match["which"].endswith(" in brief"), results)
        else:
            raise ValueError(
                f"the marker {match['begin']} must name one of {KINDS} and one of {SUITES}, or {IMPROVEMENTS!r}"
            )
        return f"{match['begin']}\n\n{table}\n\n<!-- end -->"

    return re.sub(r"(?P<begin><!-- results: (?P<which>[^>]+) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


def outdated() -> dict[Path, str]:
    """Documents whose tables are not what the results say → what they should be."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    made = {path: filled(text, RESULTS.relative_to(path.parent).as_posix()) for path, text in texts.items()}
    return {path: made[path] for path, text in texts.items() if made[path] != text}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the tables are up to date")
    check = parser.parse_args(arguments).check
    found = outdated()
    if check:
        for path in found:
            print(f"{path} is not what benchmarks/results/ says; run python benchmarks/plots.py")
        return int(bool(found))
    for path, text in found.items():
        path.write_text(text)
    for kind in KINDS:
        for name, some in machines(kind).items():
            for path in pictures.draw(name, newest_records(some), RESULTS / name):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
