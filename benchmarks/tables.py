"""What is read off a record, and the tables that show it: in the terminal, in README.md and in docs/speed.md.

python benchmarks/tables.py DIR    # everything that gpu.sh left in a directory, as one table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
FORMAT = 1
"""Of the files in results/<machine>/; other tools' files in results/ have none."""
OURS = "nabla_fast"
NO_CACHE, CHECKPOINTED = f"{OURS}, no cache", f"{OURS}, checkpointed"
ALONE, NO_DRAFTS = "one after the other", "without drafts"
NO_GRAPHS, COMPILED = f"{OURS}, without graphs", f"{OURS}, compiled"
VLLM = "vLLM"
"""What the package as a whole goes by where it is a contender, and variants of its settings."""
OPERATOR_COLUMNS = (
    *("case", "ours", "time", "time/floor", "device", "device/floor", "wall"),
    *("× eager", "× compiled", "× library", "memory"),
)
LIBRARIES = ("Liger", "cut-", "quack", "flashinfer")
"""How the names of other libraries' kernels begin."""
BRIEF_COLUMNS = ("what", "model", "machine", "nabla_fast", "published schedule", "times faster", "peak memory")
BRIEF = {
    "cpu": (
        *("generate-whole-1-float32", "generate-whole-2-float32"),
        *("generate-whole-1-bfloat16", "generate-whole-2-bfloat16", "dto-one-256", "dto-all-256"),
    ),
    "gpu": ("generate-batch-1", "dto-one-64"),
}
"""Kind of machine → the cases that README.md shows."""
SIDE_COLUMNS = (
    *("case", "nabla_fast", "without cache", "published", "times faster", "memory"),
    *("checkpointed: time", "memory of that", "gradients", "host waits", "difference"),
)
ROLLOUT_COLUMNS = (
    *("case", "nabla_fast", "other", "time", "times faster", "tokens"),
    *("calls per token", "accepted per call", "difference"),
)


GRADIENT_COLUMNS = (
    *("case", "nabla_fast", "without graphs", "times faster", "compiled", "published", "times faster than published"),
    *("memory", "host waits", "seconds of captures", "seconds to compile"),
)


def best_of_ours(record: Record) -> tuple[str, dict[str, Any]]:
    """Our fastest back end and its figures; the reference, which is plain PyTorch, only where there is no other.

    Where ours is the package as a whole, that is itself and none of its variants.
    """
    ours = {name: c for name, c in record["contenders"].items() if c["ours"]}
    if OURS in ours:
        return OURS, ours[OURS]
    kernels = {name: c for name, c in ours.items() if name != "reference"} or ours
    name = min(kernels, key=lambda n: kernels[n]["median_ms"])
    return name, kernels[name]


def times_faster(record: Record, *prefixes: str) -> float | None:
    """Time of the fastest baseline whose name begins so, over ours; None where there is none."""
    times = [c["median_ms"] for name, c in record["contenders"].items() if not c["ours"] and name.startswith(prefixes)]
    return min(times) / best_of_ours(record)[1]["median_ms"] if times else None


def memory_share(record: Record, baseline: str, ours_is: str | None = None) -> float | None:
    """Ours over a baseline's peak memory; None where either is not known, or the baseline takes none.

    ``ours_is`` names a contender; None takes the best of ours.
    """
    contenders = record["contenders"]
    ours = contenders.get(ours_is or best_of_ours(record)[0], {}).get("peak_bytes")
    theirs = contenders.get(baseline, {}).get("peak_bytes")
    return None if ours is None or not theirs else ours / theirs


def label(record: Record) -> str:
    """What was run, in a few words."""
    sizes = ", ".join(f"{name} {value}" for name, value in record["shape"].items())
    return f"{record['name']} · {record['model']} {record['dtype']} · {sizes}"


def operator_cells(record: Record) -> list[str]:
    """One cell for each of `OPERATOR_COLUMNS`."""
    name, ours = best_of_ours(record)
    return [
        label(record),
        name,
        milliseconds(ours["median_ms"]),
        f"{ours['over_floor']:.2f}" + (" *" if not clean(record) else ""),
        *_device_cells(ours),
        factor(times_faster(record, "eager")),
        factor(times_faster(record, "torch.compile")),
        factor(times_faster(record, *LIBRARIES)),
        share(memory_share(record, "eager")),
    ]


def _device_cells(ours: dict[str, Any]) -> list[str]:
    """What `measure.apart` found, on a GPU."""
    device, wall = ours.get("device_ms"), ours.get("wall_ms")
    return [
        "-" if device is None else milliseconds(device),
        "-" if device is None else f"{device / ours['median_ms'] * ours['over_floor']:.2f}",
        "-" if wall is None else milliseconds(wall),
    ]


def side_cells(record: Record) -> list[str]:
    """One cell for each of `SIDE_COLUMNS`."""
    contenders = record["contenders"]
    ours, published = contenders[OURS], contenders["published"]

    def time_of(name: str) -> str:
        return milliseconds(contenders[name]["median_ms"]) if name in contenders else "-"

    return [
        label(record),
        time_of(OURS),
        time_of(NO_CACHE),
        time_of("published"),
        factor(times_faster(record, "published")) + (" *" if not clean(record) else ""),
        share(memory_share(record, "published")),
        time_of(CHECKPOINTED),
        share(memory_share(record, "published", CHECKPOINTED)),
        f"{ours['gradient_evaluations']}, {published['gradient_evaluations']}",
        "-" if ours.get("host_waits") is None else f"{ours['host_waits']}, {published['host_waits']}",
        share(published["error"]),
    ]


def rollout_cells(record: Record) -> list[str]:
    """One cell for each of `ROLLOUT_COLUMNS`."""
    contenders = record["contenders"]
    ours = contenders[OURS]
    calls = ours.get("calls")
    others = [name for name in contenders if name != OURS]
    if others:
        (other,) = others
        time, error = milliseconds(contenders[other]["median_ms"]), share(contenders[other]["error"])
        faster = factor(times_faster(record, other)) + ("" if clean(record) else " *")
    else:
        (other,) = record["skipped"].values()
        time = faster = error = "-"
    return [
        label(record),
        milliseconds(ours["median_ms"]),
        other,
        time,
        faster,
        str(ours["tokens"]),
        factor(calls and calls / ours["tokens"]),
        factor(calls and ours["accepted"] / calls),
        error,
    ]


def gradient_cells(record: Record) -> list[str]:
    """One cell for each of `GRADIENT_COLUMNS`."""
    contenders = record["contenders"]

    def time_of(name: str) -> str:
        return milliseconds(contenders[name]["median_ms"]) if name in contenders else "-"

    plain = contenders.get(NO_GRAPHS)
    waits = [contenders[name].get("host_waits") for name in (OURS, "published")]
    return [
        label(record),
        time_of(OURS),
        time_of(NO_GRAPHS),
        factor(plain and plain["median_ms"] / contenders[OURS]["median_ms"]),
        time_of(COMPILED),
        time_of("published"),
        factor(times_faster(record, "published")) + ("" if clean(record) else " *"),
        share(memory_share(record, "published")),
        "-" if waits[0] is None else f"{waits[0]}, {waits[1]}",
        factor(contenders[OURS].get("capture_seconds")),
        factor(contenders.get(COMPILED, {}).get("compile_seconds")),
    ]


def clean(record: Record) -> bool:
    """Whether everybody had the cores, or the GPU kept the time; otherwise a star stands beside the ratio."""
    return all(contender["clean"] > 0 for contender in record["contenders"].values())


def columns_and_rows(records: list[Record], suite: str) -> tuple[tuple[str, ...], list[list[str]]]:
    """The table of one suite; columns of which nothing is known are left out."""
    columns, cells = {
        "operators": (OPERATOR_COLUMNS, operator_cells),
        "gradients": (GRADIENT_COLUMNS, gradient_cells),
        "rollouts": (ROLLOUT_COLUMNS, rollout_cells),
    }.get(suite, (SIDE_COLUMNS, side_cells))
    rows = [cells(record) for record in records if record["suite"] == suite]
    known = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    return tuple(columns[i] for i in known), [[row[i] for i in known] for row in rows]


def brief_cells(record: Record, machine: str) -> list[str]:
    """One cell for each of `BRIEF_COLUMNS`; of a case against the published schedule."""
    cells = dict(zip(SIDE_COLUMNS, side_cells(record), strict=True))
    what, model, sizes = cells["case"].split(" · ")
    memory = memory_share(record, "published")
    return [
        f"{what} ({sizes})",
        model,
        machine,
        cells["nabla_fast"],
        cells["published"],
        cells["times faster"],
        "not measured" if memory is None else f"{100 * memory:.0f} %",
    ]


def improvement_rows(found: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The table of what `improvement.py` has recorded."""
    columns = (
        "what, and why",
        "case",
        "commits",
        "before",
        "after",
        "times faster",
        "its baseline meanwhile",
        "machine",
    )
    return columns, [
        [
            f"{one['what']} {one['reason']}",
            one["case"],
            f"{one['before']['commit']}, {one['after']['commit']}",
            milliseconds(one["before"]["seconds"] * 1e3),
            milliseconds(one["after"]["seconds"] * 1e3),
            factor(one["ratio"]) + ("" if one["clean"] else " *"),
            factor(one["baseline_ratio"]),
            f"{one['machine']['processor']}, {one['threads']} threads",
        ]
        for one in found
    ]


def summary(result: dict[str, Any]) -> list[Table]:
    """A table for each suite that was run."""
    shown = []
    for suite in dict.fromkeys(record["suite"] for record in result["records"] if "error" not in record):
        columns, rows = columns_and_rows([r for r in result["records"] if "error" not in r], suite)
        table = Table(title=f"{suite}, {result['device']}, {result['threads']} threads")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1000:.3g} µs"


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def overview(directory: Path) -> Table:
    """What gpu.sh left in a directory: a row for each measured case, and one for each part that was to be run."""
    table = Table("", "ours", "time", "time/floor", "times faster", "memory", title=str(directory))
    for file in sorted(directory.glob("*.json")):
        for record in json.loads(file.read_text())["records"]:
            table.add_row(*_overview_cells(record))
        table.add_section()
    status = directory / "status.tsv"
    for line in status.read_text().splitlines() if status.exists() else ():
        part, outcome, seconds = line.split("\t")
        table.add_row(part, outcome, f"{seconds} s")
    return table


def _overview_cells(record: Record) -> list[str]:
    if "error" in record:
        return [record["case"], record["error"].splitlines()[0]]
    name, ours = best_of_ours(record)
    over = f"{ours['over_floor']:.2f}" if "over_floor" in ours else "-"
    memory = share(memory_share(record, "eager") or memory_share(record, "published"))
    without = "".join(f", {reason}" for other, reason in record.get("skipped", {}).items() if other == VLLM)
    return [
        record["case"] + without,
        name,
        milliseconds(ours["median_ms"]),
        over,
        factor(times_faster(record, "")),
        memory,
    ]


if __name__ == "__main__":
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(overview(Path(sys.argv[1])))
