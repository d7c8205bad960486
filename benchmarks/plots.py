"""Draws the results, and fills the tables of README.md and docs/ from them.

    python benchmarks/plots.py            # everything in benchmarks/results/
    python benchmarks/plots.py --check    # exit status 1 if a table does not say what the results say

A table stands between ``<!-- results: WHICH -->`` and ``<!-- end -->``. WHICH is a kind of machine (cpu or gpu) and a
suite, as in "cpu operators"; "speed in brief"; "improvements"; "quality in brief"; "cross tokenizer"; "quantised"; or
"quality" and a task, as in "quality arithmetic". A machine's directory may hold several runs; of every case the newest
one counts, and quick runs never do. Cases that were never measured there are named below the table.
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
import quality_report
import torch
from cases import Setting
from run import SUITES, cases_of
from tables import BRIEF, BRIEF_COLUMNS, FORMAT, Record, brief_cells, columns_and_rows, improvement_rows

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DOCS = ROOT / "docs"
DOCUMENTS = (ROOT / "README.md", DOCS / "speed.md", DOCS / "quality.md", DOCS / "guides" / "quantised.md")
PICTURES = DOCS / "assets" / "speed"
"""A folder for each machine; the documents with pictures are in docs/."""
KINDS = ("cpu", "gpu")
IMPROVEMENTS, CROSS_TOKENIZER, QUANTISED = "improvements", "cross tokenizer", "quantised"
SPEED_IN_BRIEF, QUALITY_IN_BRIEF, QUALITY = "speed in brief", "quality in brief", "quality "
QUALITY_TABLES = {"quality probes": quality_report.of_probes, "quality seconds": quality_report.of_seconds}
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


def section(kind: str, suite: str) -> str:
    """The Markdown of one suite on all machines of a kind."""
    parts = []
    for name, some in machines(kind).items():
        records = newest_records(some)
        if not any(record["suite"] == suite for record in records):
            continue
        parts.append(f"{described(name, some, suite)}\n\n{markdown(*columns_and_rows(records, suite))}")
        if missing := lacking(kind, suite, records):
            parts.append(f"Not measured there: {', '.join(missing)}.")
        titles = {"operators": pictures.PICTURES, "generate": (pictures.DECODE_PICTURE,)}.get(suite, ())
        parts += [f"![{title} on {name}]({PICTURES.relative_to(DOCS)}/{name}/{title}.png)" for title in titles]
    return "\n\n".join(parts) or NOT_MEASURED


def speed_in_brief() -> str:
    """The Markdown of the cases that `tables.BRIEF` names, on every machine where they were measured."""
    rows = []
    for kind, cases in BRIEF.items():
        found = [(r, hardware(some)) for some in machines(kind).values() for r in newest_records(some)]
        for case in cases:
            of_case = [brief_cells(record, machine) for record, machine in found if record["case"] == case]
            rows += of_case or [[case, "", kind, *[NOT_MEASURED] * 4]]
    return markdown(BRIEF_COLUMNS, rows)


def lacking(kind: str, suite: str, records: Iterable[Record]) -> list[str]:
    """What of a suite has no record: single cases, or a group of them where none has one."""
    measured = {record["case"] for record in records}
    missing = []
    for group, names in case_names(kind, suite).items():
        absent = [name for name in names if name not in measured]
        missing += [f"`{name}`" for name in absent] if len(absent) < len(names) else [f"all of `{group}`"] * bool(names)
    return missing


@functools.cache
def case_names(kind: str, suite: str) -> dict[str, list[str]]:
    """The cases that `run.py` has for a kind of machine, by group, whether it is this machine or not."""
    setting = Setting(torch.device("cuda" if kind == "gpu" else "cpu"))
    return {group: [case.name for case in cases_of(group, setting)] for group in SUITES[suite]}


def improvements() -> str:
    """The Markdown of results/improvements.json: what was made faster, and the commands that measure it again."""
    file = RESULTS / f"{IMPROVEMENTS}.json"
    found = [one for one in json.loads(file.read_text()) if not one["quick"]] if file.exists() else []
    if not found:
        return NOT_MEASURED
    commands = "\n".join(dict.fromkeys(one["command"] for one in found))
    return f"{markdown(*improvement_rows(found))}\n\n```sh\n{commands}\n```"


def cross_tokenizer() -> str:
    """The table of results/cross_tokenizer.json."""
    file = RESULTS / "cross_tokenizer.json"
    if not file.exists():
        return NOT_MEASURED
    columns = (
        "digits in a token",
        "vocabulary",
        "swaps",
        "candidates",
        "gradient, one slot",
        "gradient, slots",
        "rewards",
    )
    rows = [
        [
            *(str(row[key]) for key in ("digits", "vocabulary", "swaps", "candidates")),
            *(f"{row['right_first'][key]:.1%}" for key in ("one_slot", "slots", "rewards")),
        ]
        for row in json.loads(file.read_text())["rows"]
    ]
    return markdown(columns, rows)


def quantised() -> str:
    """The table of results/quantised.json."""
    file = RESULTS / "quantised.json"
    if not file.exists():
        return NOT_MEASURED
    plain, *others = json.loads(file.read_text())["quantizations"]
    columns = (
        "`quantization`",
        "weights of both",
        "time of a sampled token",
        "time of a gradient, 32 tokens",
        "gradient differs by",
    )
    rows = [
        [
            f"`{row['quantization']}`",
            f"{row['weight_bytes'] / plain['weight_bytes']:.0%}",
            *(f"{row[f'{what}_over_float32']:.2f} times" for what in ("token", "gradient")),
            f"{row['gradient_relative_difference']:.0%}",
        ]
        for row in others
    ]
    return markdown(columns, rows)


def described(name: str, some: Sequence[dict[str, Any]], suite: str) -> str:
    """The machine, and the files behind a table with the commits that they measured."""
    behind = [run for run in some if any(record.get("suite") == suite for record in run["records"])]
    files = ", ".join(f"`benchmarks/results/{name}/{run['file']}` at {run['commit']}" for run in behind)
    return f"{hardware(behind)}, torch {behind[-1]['versions']['torch']} ({files}):"


def hardware(some: Sequence[dict[str, Any]]) -> str:
    """The GPU or processor that runs on one machine were made on; its vectors where they are not AVX512."""
    last = some[-1]
    machine, vectors = last["machine"], last["machine"].get("capability", "AVX512")
    processor = machine["processor"] + ("" if vectors == "AVX512" else f" ({vectors})")
    return machine.get("gpu", {}).get("name") or f"{processor}, {last['threads']} threads"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    # A bare star would begin emphasis.
    return "\n".join("| " + " | ".join(cell.replace("*", "\\*") for cell in line) + " |" for line in lines)


def filled(text: str) -> str:
    """``text`` with the tables that its markers name."""

    def fill(match: re.Match[str]) -> str:
        return f"{match['begin']}\n\n{table(match['which'])}\n\n<!-- end -->"

    return re.sub(r"(?P<begin><!-- results: (?P<which>[^>]+) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


def table(which: str) -> str:
    """The Markdown that stands between a marker and its end.

    Raises:
        ValueError: if there is no such table.
    """
    whole = {
        SPEED_IN_BRIEF: speed_in_brief,
        IMPROVEMENTS: improvements,
        CROSS_TOKENIZER: cross_tokenizer,
        QUANTISED: quantised,
    }
    kind, _, suite = which.partition(" ")
    if which in whole:
        return whole[which]()
    if kind in KINDS and suite in SUITES:
        return section(kind, suite)
    if which == QUALITY_IN_BRIEF:
        return quality_report.in_brief(RESULTS / "quality")
    if which in QUALITY_TABLES:
        return QUALITY_TABLES[which](RESULTS / "quality")
    if which.startswith(QUALITY) and (RESULTS / "quality" / f"{suite}.json").exists():
        made = quality_report.of_proposals if suite.startswith("proposals") else quality_report.of_task
        return made(RESULTS / "quality" / f"{suite}.json")
    raise ValueError(
        f"the marker {which!r} must name one of {KINDS} and one of {tuple(SUITES)}, or be one of "
        f"{*whole, QUALITY_IN_BRIEF}, or {QUALITY!r} and a task in {RESULTS / 'quality'}"
    )


def outdated() -> dict[Path, str]:
    """Documents whose tables are not what the results say → what they should be."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    made = {path: filled(text) for path, text in texts.items()}
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
            for path in pictures.draw(name, newest_records(some), PICTURES / name):
                print(path)
    for file in sorted((RESULTS / "quality").glob("*.json")):
        for path in quality_report.draw(file, DOCS):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
