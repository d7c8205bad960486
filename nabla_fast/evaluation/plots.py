"""The plots of a run, from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from nabla_fast.evaluation.journal import write_file

# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker for print.
_STYLES = {
    "greedy": ("#999999", "D"),
    "self-consistency": ("#009E73", "s"),
    "best-of-n": ("#E69F00", "^"),
    "nabla": ("#0072B2", "o"),
}
# For methods of other names, such as runs with other settings, in the order in which they come.
_OTHER_STYLES = (("#0072B2", "o"), ("#CC79A7", "v"), ("#D55E00", "P"), ("#56B4E9", "X"), ("#000000", "<"))
_BEFORE, _AFTER = "#777777", "#0072B2"
_COSTS = {
    "model_calls": "model calls per problem",
    "seconds": "seconds per problem",
    "flops": "estimated FLOPs per problem",
}
FILES = (*(f"accuracy_over_{cost}.png" for cost in _COSTS), "reward.png", "cache_hit_rate.png")
"""Names of the files that `draw` may write."""


def draw(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws what the summary has figures for; returns the PNG files.

    They are among `FILES`: accuracy over each cost, the reward before and after, and the cache's hit rate.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots need matplotlib; run pip install "nabla_fast[eval]"') from error
    arms = {label: arm for label, arm in summary["arms"].items() if arm["accuracy"] is not None}
    files = []
    for name, drawing in zip(FILES, (*map(_accuracy_over, _COSTS), _rewards, _hit_rates), strict=True):
        # A figure of its own, without pyplot: no window, no state that belongs to the caller.
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        if drawing(axes, arms):
            axes.set_title(f"{summary['task']['name']}, {summary['task']['problems']} problems", loc="left")
            files.append(directory / name)
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=150)
            write_file(files[-1], drawn.getvalue())
    return files


def _accuracy_over(cost: str) -> Any:
    def drawing(axes: Any, arms: Mapping[str, Any]) -> bool:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        if not arms:
            return False
        grouped = _by_method(arms)
        others = [method for method in grouped if method not in _STYLES]
        for method, found in grouped.items():
            colour, marker = _style(method, others)
            x = [arm[cost]["mean"] for arm in found]
            y = [arm["accuracy"]["mean"] for arm in found]
            spread = [[abs(arm["accuracy"]["mean"] - arm["accuracy"][end]) for arm in found] for end in ("low", "high")]
            axes.errorbar(x, y, yerr=spread, label=_name(method), color=colour, marker=marker, capsize=3, alpha=0.9)
            for text, place in _labels(found, x, y) if method != "greedy" else ():
                axes.annotate(text, place, textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_COSTS[cost])
        axes.set_ylabel("accuracy, 95 % intervals")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return True

    return drawing


def _rewards(axes: Any, arms: Mapping[str, Any]) -> bool:
    """Where the first response of each method is, and where its answer is."""
    scored = {label: arm for label, arm in arms.items() if arm["reward"] is not None}
    if not scored:
        return False
    for row, arm in enumerate(scored.values()):
        before, after = arm["reward_before"], arm["reward"]
        axes.plot([before["mean"], after["mean"]], [row, row], color="#BBBBBB", zorder=1)
        for measure, colour, shift in ((before, _BEFORE, 0.12), (after, _AFTER, -0.12)):
            axes.plot([measure["low"], measure["high"]], [row + shift] * 2, color=colour, alpha=0.5, zorder=1)
        # A ring, which a dot in the same place leaves to be seen.
        axes.scatter(before["mean"], row, s=90, facecolors="white", edgecolors=_BEFORE, linewidths=2, zorder=2)
        axes.scatter(after["mean"], row, s=30, color=_AFTER, zorder=3)
    handles = [axes.scatter([], [], s=90, facecolors="white", edgecolors=_BEFORE, linewidths=2)]
    handles.append(axes.scatter([], [], s=30, color=_AFTER))
    axes.legend(handles, ["first response", "answer"], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_yticks(range(len(scored)), [_name(label) for label in scored])
    axes.set_ylim(len(scored) - 0.5, -0.5)
    axes.set_xlabel("mean reward, 95 % intervals")
    axes.grid(alpha=0.3, axis="x")
    return True


def _hit_rates(axes: Any, arms: Mapping[str, Any]) -> bool:
    cached = {label: arm["cache_hit_rate"] for label, arm in arms.items() if arm["cache_hit_rate"] is not None}
    if not cached:
        return False
    # Lying down, so that names of any length find room.
    bars = axes.barh([_name(label) for label in cached], list(cached.values()), color="#0072B2", height=0.6)
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    axes.set_ylim(len(cached) - 0.25, -0.75)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("look-ups answered by the gradient cache")
    return True


def _by_method(arms: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in sorted(arms.values(), key=lambda arm: arm["n"]):
        found.setdefault(arm["method"], []).append(arm)
    return {method: found[method] for method in (*_STYLES, *found) if method in found}


def _name(label: str) -> str:
    return label.replace("nabla", "∇-Reasoner")


def _labels(arms: list[dict[str, Any]], x: list[float], y: list[float]) -> list[tuple[str, tuple[float, float]]]:
    """The n of each point; one label for neighbours that lie on each other."""
    labels: list[tuple[list[int], tuple[float, float]]] = []
    for arm, left, top in zip(arms, x, y, strict=True):
        if labels and abs(left / labels[-1][1][0] - 1) < 0.03 and abs(top - labels[-1][1][1]) < 0.02:
            labels[-1][0].append(arm["n"])
        else:
            labels.append(([arm["n"]], (left, top)))
    return [(f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]), place) for n, place in labels]


def _style(method: str, others: list[str]) -> tuple[str, str]:
    if method in _STYLES:
        return _STYLES[method]
    return _OTHER_STYLES[others.index(method) % len(_OTHER_STYLES)]
