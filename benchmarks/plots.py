"""Draws the results and fills the tables of benchmarks/README.md from them.

    python benchmarks/plots.py            # every machine in benchmarks/results/
    python benchmarks/plots.py --check    # exit status 1 if README.md does not say what the results say

A machine's directory may hold several runs; of every case the newest one counts, and quick runs never do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tables import FORMAT, Record, best_of_ours, columns_and_rows, label, times_faster

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
KINDS = ("cpu", "gpu")
SUITES = ("operators", "dto", "generate")
PICTURES = ("speedup", "roofline", "memory")
NOT_MEASURED = "not measured"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "eager": "#0072B2",
    "torch.compile": "#E69F00",
    "Liger": "#009E73",
    "cut-": "#CC79A7",
    "published": "#0072B2",
}
BOUND = {"memory": "#0072B2", "arithmetic": "#E69F00"}


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
        columns, rows = columns_and_rows(newest_records(some), suite)
        if rows:
            parts.append(f"{described(name, some, suite)}\n\n{markdown(columns, rows)}")
            if suite == "operators":
                parts += [f"![{title} on {name}](results/{name}/{title}.png)" for title in PICTURES]
    return "\n\n".join(parts) or NOT_MEASURED


def described(name: str, some: Sequence[dict[str, Any]], suite: str) -> str:
    """The machine, and the files and versions behind a table."""
    behind = [run for run in some if any(record.get("suite") == suite for record in run["records"])]
    last = behind[-1]
    machine = last["machine"].get("gpu", {}).get("name") or f"{last['machine']['processor']}, {last['threads']} threads"
    files = ", ".join(f"`results/{name}/{run['file']}`" for run in behind)
    return f"{machine}, torch {last['versions']['torch']}, commit {last['commit']} ({files}):"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    # A bare star would begin emphasis.
    return "\n".join("| " + " | ".join(cell.replace("*", "\\*") for cell in line) + " |" for line in lines)


def filled(text: str) -> str:
    """``text`` with what stands between every pair of markers ``<!-- results: KIND SUITE -->`` and ``<!-- end -->``."""

    def fill(match: re.Match[str]) -> str:
        kind, suite = match["kind"], match["suite"]
        if kind not in KINDS or suite not in SUITES:
            raise ValueError(f"the marker {match['begin']} must name one of {KINDS} and one of {SUITES}")
        return f"{match['begin']}\n\n{section(kind, suite)}\n\n<!-- end -->"

    pattern = r"(?P<begin><!-- results: (?P<kind>\S+) (?P<suite>\S+) -->).*?<!-- end -->"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def draw(name: str, records: Sequence[Record], directory: Path) -> list[Path]:
    """Speed-ups, distance from the roofline and memory of one machine; the PNG files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    operators = [record for record in records if record["suite"] == "operators"]
    sides = [record for record in records if record["suite"] != "operators"]
    written = []
    drawings = ((draw_speedup, [*operators, *sides]), (draw_roofline, operators), (draw_memory, [*operators, *sides]))
    for title, (draw_one, some) in zip(PICTURES, drawings, strict=True):
        if some:
            written.append(directory / f"{title}.png")
            figure(draw_one, some, name, written[-1])
    return written


def figure(draw_one: Any, records: Sequence[Record], name: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(figsize=(11, 1.6 + 0.34 * len(records)), layout="constrained")
    draw_one(axes, records)
    axes.set_yticks(range(len(records)), [label(record) for record in records], fontsize=8)
    axes.set_ylim(-0.6, len(records) - 0.4)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, loc="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        plot.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False)
    plot.savefig(path, dpi=120)
    plt.close(plot)


def draw_speedup(axes: Any, records: Sequence[Record]) -> None:
    """How many times faster ours is than the best baseline of each kind; a line at 1."""
    for row, record in enumerate(records):
        found = {kind: times_faster(record, kind) for kind in COLOURS}
        shown = {kind: value for kind, value in found.items() if value is not None}
        height = 0.8 / max(1, len(shown))
        for i, (kind, value) in enumerate(shown.items()):
            y = row - 0.4 + (i + 0.5) * height
            axes.barh(y, value - 1, left=1, height=height, color=COLOURS[kind], label=kind.strip("-"))
            axes.annotate(
                f"{value:.2g}", (max(value, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than the baseline (log scale)")


def draw_roofline(axes: Any, records: Sequence[Record]) -> None:
    """Time over the floor of our fastest back end; 1 is the device's limit."""
    for row, record in enumerate(records):
        value = best_of_ours(record)[1]["over_floor"]
        bound = record["floor"]["bound"]
        axes.barh(row, value - 1, left=1, height=0.7, color=BOUND[bound], label=f"bound by {bound}")
        axes.annotate(f"{value:.2g}", (max(value, 1), row), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time over the floor (log scale)")


def draw_memory(axes: Any, records: Sequence[Record]) -> None:
    """Peak memory that a call adds: our fastest back end, and the baseline everybody has."""
    for row, record in enumerate(records):
        baseline = "eager" if "eager" in record["contenders"] else "published"
        ours, theirs = best_of_ours(record)[1].get("peak_bytes"), record["contenders"][baseline].get("peak_bytes")
        for offset, value, colour, who in ((-0.2, ours, "#009E73", "nabla_fast"), (0.2, theirs, "#0072B2", "baseline")):
            if value is not None:
                axes.barh(row + offset, max(value / 2**20, 0.01), height=0.38, color=colour, label=who)
    axes.set_xscale("log")
    axes.set_xlabel("peak memory of a call beyond its inputs, MiB (log scale; 0.01 and less are drawn alike)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether README.md is up to date")
    check = parser.parse_args().check
    before = README.read_text()
    after = filled(before)
    if check:
        if after != before:
            print("benchmarks/README.md is not what benchmarks/results/ says; run python benchmarks/plots.py")
        return int(after != before)
    README.write_text(after)
    for kind in KINDS:
        for name, some in machines(kind).items():
            for path in draw(name, newest_records(some), RESULTS / name):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
