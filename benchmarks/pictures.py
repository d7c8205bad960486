"""What `plots.py` draws of a machine's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import OURS, Record, best_of_ours, label, times_faster

from nabla_fast.evaluation.plots import SPEED_COLOURS as COLOURS

PICTURES = ("speedup", "roofline", "memory")
DECODE_PICTURE = "phases"
NAMES = {"Liger": "Liger-Kernel", "cut-": "cut-cross-entropy", "published": "published schedule"}
BOUND = {"memory": "#56A0A3", "arithmetic": "#B9A06A", "barriers": "#8A8A8A"}
# No method's colours. The two large phases get the most distinct ones.
PHASE_COLOURS = {
    "gradient": "#1F5F66",
    "dto": "#B9A06A",
    "selection": "#7FBFC2",
    "reward": "#D8C8A0",
    "resample": "#4A4A4A",
    "rollout": "#A65E4E",
    "other": "#C9C9C9",
}


def draw(name: str, records: Sequence[Record], directory: Path) -> list[Path]:
    """Speed-ups, distance from the roofline, memory and a decode's phases on one machine; the PNG files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    operators = [record for record in records if record["suite"] == "operators"]
    # Those against the published schedule; rollouts have tables alone.
    sides = [record for record in records if "published" in record["contenders"]]
    written = []
    weighed = [r for r in (*operators, *sides) if best_of_ours(r)[1].get("peak_bytes") is not None]
    drawings = ((draw_speedup, [*operators, *sides]), (draw_roofline, operators), (draw_memory, weighed))
    for title, (draw_one, some) in zip(PICTURES, drawings, strict=True):
        if some:
            written.append(directory / f"{title}.png")
            figure(draw_one, some, name, written[-1])
    decodes = [record for record in records if record["suite"] == "generate"]
    if decodes:
        written.append(directory / f"{DECODE_PICTURE}.png")
        draw_phases(decodes, name, written[-1])
    return written


def figure(draw_one: Any, records: Sequence[Record], name: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    crowded = draw_one is draw_speedup and any(len(speedups(record)) > 2 for record in records)
    height = 0.46 if crowded else 0.34
    plot, axes = plt.subplots(figsize=(11, 1.6 + height * len(records)), layout="constrained")
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


def speedups(record: Record) -> dict[str, float]:
    """Kind of baseline, as in `COLOURS` → how many times faster ours is."""
    found = {kind: times_faster(record, kind) for kind in COLOURS if kind != OURS}
    return {kind: value for kind, value in found.items() if value is not None}


def draw_speedup(axes: Any, records: Sequence[Record]) -> None:
    """How many times faster ours is than the best baseline of each kind; a line at 1."""
    for row, record in enumerate(records):
        shown = speedups(record)
        height = 0.84 / max(1, len(shown))
        for i, (kind, value) in enumerate(shown.items()):
            y = row - 0.42 + (i + 0.5) * height
            axes.barh(y, value - 1, left=1, height=height, color=COLOURS[kind], label=NAMES.get(kind, kind))
            annotate(axes, value, y, 7 if len(shown) < 3 else 6)
    from_one(axes, "times faster than the baseline (log scale)")


def draw_roofline(axes: Any, records: Sequence[Record]) -> None:
    """Time over the floor of our fastest back end; 1 is the device's limit."""
    for row, record in enumerate(records):
        value = best_of_ours(record)[1]["over_floor"]
        bound = record["floor"]["bound"]
        axes.barh(row, value - 1, left=1, height=0.7, color=BOUND[bound], label=f"bound by {bound}")
        annotate(axes, value, row, 7)
    from_one(axes, "time over the floor (log scale)")


def annotate(axes: Any, value: float, y: float, size: float) -> None:
    """Writes a ratio behind its bar."""
    text = f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
    axes.annotate(text, (max(value, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=size)


def from_one(axes: Any, title: str) -> None:
    """A logarithmic axis of ratios, with a line at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.margins(x=0.05)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(title)


def draw_memory(axes: Any, records: Sequence[Record]) -> None:
    """Peak memory that a call adds: our fastest back end, and the baseline everybody has."""
    for row, record in enumerate(records):
        baseline = "eager" if "eager" in record["contenders"] else "published"
        ours, theirs = best_of_ours(record)[1].get("peak_bytes"), record["contenders"][baseline].get("peak_bytes")
        for offset, value, colour, who in (
            (-0.2, ours, COLOURS[OURS], OURS),
            (0.2, theirs, COLOURS[baseline], baseline),
        ):
            if value is not None:
                axes.barh(row + offset, max(value / 2**20, 0.01), height=0.38, color=colour, label=who)
    axes.set_xscale("log")
    axes.set_xlabel("peak memory of a call beyond its inputs, MiB\n(log scale; 0.01 and less are drawn alike)")


def draw_phases(records: Sequence[Record], name: str, path: Path) -> None:
    """Seconds of each phase of a decode, rollouts left out, of every side: a plot for each case."""
    from matplotlib import pyplot as plt

    plot, grid = plt.subplots(
        len(records), 1, figsize=(11, 1 + 1.4 * len(records)), squeeze=False, layout="constrained"
    )
    for axes, record in zip(grid[:, 0], records, strict=True):
        contenders = record["contenders"]
        for row, contender in enumerate(contenders.values()):
            left = 0.0
            for phase, seconds in phases(contender).items():
                axes.barh(row, seconds, left=left, color=PHASE_COLOURS[phase])
                left += seconds
            axes.annotate(f"{left:.3g} s", (left, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(contenders)), list(contenders), fontsize=8)
        for tick, name_of in zip(axes.get_yticklabels(), contenders, strict=True):
            if name_of == OURS:
                tick.set(color=COLOURS[OURS], fontweight="bold")
        axes.margins(x=0.1)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{label(record)}, on {name}", loc="left", fontsize=9)
    grid[-1, 0].set_xlabel("seconds; rollouts, where they are replayed, left out")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PHASE_COLOURS.values()]
    plot.legend(handles, list(PHASE_COLOURS), loc="outside lower center", ncols=len(handles), frameon=False)
    plot.savefig(path, dpi=120)
    plt.close(plot)


def phases(contender: dict[str, Any]) -> dict[str, float]:
    """Seconds of every phase of a decode, and of what is outside all of them."""
    seconds = dict(contender["seconds"])
    return {**seconds, "other": max(0.0, contender["median_ms"] / 1e3 - sum(seconds.values()))}
