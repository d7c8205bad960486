"""Draws where the time goes, from the JSON of `end_to_end.py`.

    python benchmarks/end_to_end_plot.py benchmarks/results/end_to_end.json OUTPUT.png

`end_to_end.py --plot` does the same at the end of a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; the two large phases get the most distinct ones.
COLOURS = {
    "gradient": "#0072B2",
    "dto": "#E69F00",
    "selection": "#009E73",
    "reward": "#CC79A7",
    "resample": "#F0E442",
    "other": "#999999",
}
LABELS = {
    "ours": "nabla_fast",
    "ours_without_cache": "nabla_fast,\nno gradient cache",
    "published": "published schedule",
    "published_moving": "published schedule,\nmoving row only",
}
NARROWEST = 0.08  # of the axis: a label in a narrower segment would run into its neighbours
Runs = dict[str, dict[str, Any]]


def draw(totals: dict[str, Any], path: Path) -> None:
    """One row per anchor: all sides on one scale, and beside them ours on a scale of its own.

    Args:
        totals: anchor → the sums that `end_to_end.totals` makes.
        path: PNG to write.
    """
    figure, grid = plt.subplots(
        len(totals), 2, figsize=(13, 1.3 + 2.4 * len(totals)), squeeze=False, width_ratios=(3, 2), layout="constrained"
    )
    for (left, right), (anchor, total) in zip(grid, totals.items(), strict=True):
        runs = {name: total["runs"][name] for name in LABELS if name in total["runs"]}
        bars(left, runs, 0.6)
        left.set_title(f'anchor "{anchor}": all on one scale', loc="left")
        bars(right, {"ours": runs["ours"]}, 0.6 / len(runs))
        right.set_title("nabla_fast alone", loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("seconds, rollouts left out")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(axes: Axes, runs: Runs, height: float) -> None:
    """One stacked bar per side, its total behind it."""
    longest = max(run["everything_but_rollouts"] for run in runs.values())
    for row, run in enumerate(runs.values()):
        left = 0.0
        for phase, colour in COLOURS.items():
            seconds = run["seconds"][phase]
            axes.barh(row, seconds, left=left, color=colour, height=height)
            if seconds >= NARROWEST * longest:
                dark = phase in ("gradient", "selection")
                x, text = left + seconds / 2, amount(seconds)
                axes.text(x, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
            left += seconds
        axes.text(left + 0.01 * longest, row, f"{amount(left)} s", ha="left", va="center", fontweight="bold")
    axes.set_yticks(range(len(runs)), [LABELS[name] for name in runs])
    axes.set_xlim(0, 1.15 * longest)  # room for the total
    axes.set_ylim(-0.5, len(runs) - 0.5)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def amount(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    draw(json.loads(source.read_text())["totals"], target)
