"""The plots of a run, from its summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from nabla_fast.evaluation.budget import COSTS
from nabla_fast.whole_files import write_file

STYLES = {
    "greedy": ("#8A8A8A", "D"),
    "self-consistency": ("#7FB08A", "s"),
    "best-of-n": ("#6E93C4", "^"),
    "beam-search": ("#8C6D46", "<"),
    "mcts": ("#4F6D7A", ">"),
    "likeliest": ("#E08A5B", "p"),
    "first-order": ("#9467BD", "h"),
    "prefix-reward": ("#3F8F5B", "d"),
    "guided": ("#333333", "*"),
    "best-of-n, a reward taught to judge alone": ("#A48CC8", "v"),
    "∇-Reasoner, reward's gradient off": ("#DDA63A", "P"),
    "∇-Reasoner, published anchor": ("#5BB5B8", "X"),
    "nabla": ("#C2104B", "o"),
}
"""Method → its colour and marker in every plot of the project. ∇-Reasoner's is the strongest; it is drawn last."""
NABLA = STYLES["nabla"][0]
SPEED_COLOURS = {
    "nabla_fast": NABLA,
    "eager": "#6E93C4",
    "torch.compile": "#DDA63A",
    "Liger": "#7FB08A",
    "cut-": "#A48CC8",
    "quack": "#C98B7B",
    "flashinfer": "#5F9EA0",
    "published": "#8A8A8A",
}
"""Contender of a speed benchmark, by the beginning of its name → its colour in every plot."""
# For methods of other names, such as runs with other settings, in the order in which they come.
_OTHER_STYLES = (("#3F6FA8", "<"), ("#B5651D", ">"), ("#4F8F5B", "p"), ("#6B4FA0", "h"), ("#333333", "*"))
_BEFORE = "#8A8A8A"
_ONE_N = ("greedy", "guided")
# What ∇-Reasoner is called: by `nabla-fast eval`, and in the reports of several runs.
_OURS = ("nabla", "∇-Reasoner")
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
    budget = summary.get("budget")
    over = [partial(_accuracy, cost=cost, budget=budget) for cost in _COSTS]
    drawings: list[Callable[..., bool]] = [*over, _rewards, _hit_rates]
    for name, drawing in zip(FILES, drawings, strict=True):
        # A figure of its own, without pyplot: no window, no state that belongs to the caller.
        figure = Figure(figsize=(7.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        if drawing(axes, arms):
            told = f"{summary['task']['name']}, {summary['task']['problems']} problems"
            told += f", {budget['kind']}={budget['amount']:g} each" if budget else ""
            axes.set_title(told, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            files.append(directory / name)
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=150)
            write_file(files[-1], drawn.getvalue())
    return files


def _accuracy(axes: Any, arms: Mapping[str, Any], cost: str, budget: Mapping[str, Any] | None) -> bool:
    """Accuracy over ``cost``, with a line at the budget where that is of this cost."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not arms:
        return False
    grouped = _by_method(arms)
    labels: list[tuple[str, tuple[float, float], str]] = []
    for method, found in grouped.items():
        colour, marker = _style(method, grouped)
        ours = method in _OURS
        x = [arm[cost]["mean"] for arm in found]
        y = [arm["accuracy"]["mean"] for arm in found]
        spread = [[abs(arm["accuracy"]["mean"] - arm["accuracy"][end]) for arm in found] for end in ("low", "high")]
        axes.errorbar(
            x,
            y,
            spread,
            label=_name(method),
            color=colour,
            marker=marker,
            markersize=8 if ours else 6,
            linewidth=2.5 if ours else 1.5,
            elinewidth=1.2,
            capsize=2,
            zorder=4 if ours else 3,
        )
        labels += [(text, place, colour) for text, place in _labels(found, x, y) if method not in _ONE_N]
    if budget and COSTS[budget["kind"]] == cost:
        axes.axvline(budget["amount"], color=_BEFORE, linestyle=":", label="budget", zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{_COSTS[cost]}, log scale{'; beside a point: n' if labels else ''}")
    axes.set_ylabel("accuracy, 95 % intervals")
    ends = [arm["accuracy"][end] for arm in arms.values() for end in ("low", "high")]
    axes.set_ylim(max(min(ends) - 0.06, -0.02), min(max(ends) + 0.06, 1.02))
    axes.grid(alpha=0.3)
    handles, names = (some[::-1] for some in axes.get_legend_handles_labels())
    axes.figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _write_apart(axes, labels)
    return True


def _write_apart(axes: Any, labels: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Writes (text, point, colour) beside the points, where no line, bar or other text is."""
    axes.figure.draw_without_rendering()  # so that the axes have their final place
    pixels, size = axes.figure.dpi / 72, 8.0
    taken: list[tuple[float, float, float, float]] = []
    for container in axes.containers:
        line, _, bars = container
        points = axes.transData.transform(list(zip(*line.get_data(), strict=True)))
        ends = [axes.transData.transform(segment) for bar in bars for segment in bar.get_segments()]
        for segment in [*ends, *pairwise(points)]:
            (x0, y0), (x1, y1) = segment
            steps = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / 3))
            along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
            taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in along]
        taken += [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for text, point, colour in labels:
        x, y = axes.transData.transform(point)
        width, height = 0.66 * size * len(text) * pixels, size * pixels
        places = [
            (x + shift * away - (width if shift < 0 else width / 2 if shift == 0 else 0), y + rise * away - height / 2)
            for away in (9, 13, 18, 24, 32)
            for shift, rise in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1.6), (0, -1.6))
        ]
        boxes = [(left, low, left + width, low + height) for left, low in places]
        best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(best)
        axes.annotate(
            text,
            axes.transData.inverted().transform(best[:2]),
            color=colour,
            fontsize=size,
            fontweight="bold",
            annotation_clip=False,
        )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Pixels that two boxes (left, low, right, high) share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _rewards(axes: Any, arms: Mapping[str, Any]) -> bool:
    """Where the first response of each method is, and where its answer is."""
    scored = {label: arm for label, arm in arms.items() if arm["reward"] is not None}
    if not scored:
        return False
    axes.figure.set_figheight(1.6 + 0.26 * len(scored))
    grouped = _by_method(scored)
    for row, arm in enumerate(scored.values()):
        ours = _style(arm["method"], grouped)[0]
        before, after = arm["reward_before"], arm["reward"]
        drawn = [(after, ours, -0.12)]
        if before is not None:  # beam search draws no response that would be the first
            drawn.append((before, _BEFORE, 0.12))
            axes.plot([before["mean"], after["mean"]], [row, row], color="#BBBBBB", zorder=1)
            # A ring, which a dot in the same place leaves to be seen.
            axes.scatter(before["mean"], row, s=90, facecolors="white", edgecolors=_BEFORE, linewidths=2, zorder=2)
        for measure, colour, shift in drawn:
            axes.plot([measure["low"], measure["high"]], [row + shift] * 2, color=colour, alpha=0.5, zorder=1)
        axes.scatter(after["mean"], row, s=30, color=ours, zorder=3)
    handles = [axes.scatter([], [], s=90, facecolors="white", edgecolors=_BEFORE, linewidths=2)]
    handles.append(axes.scatter([], [], s=30, color="black"))
    axes.figure.legend(
        handles,
        ["first response", "answer, in the method's colour"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    axes.set_yticks(range(len(scored)), [_name(label) for label in scored])
    axes.set_ylim(len(scored) - 0.5, -0.5)
    axes.set_xlabel("mean reward, 95 % intervals")
    axes.grid(alpha=0.3, axis="x")
    return True


def _hit_rates(axes: Any, arms: Mapping[str, Any]) -> bool:
    cached_arms = {label: arm for label, arm in arms.items() if arm["cache_hit_rate"] is not None}
    cached = {label: arm["cache_hit_rate"] for label, arm in cached_arms.items()}
    if not cached:
        return False
    # Lying down, so that names of any length find room.
    axes.figure.set_figheight(1.6 + 0.3 * len(cached))
    grouped = _by_method(cached_arms)
    colours = [_style(arm["method"], grouped)[0] for arm in cached_arms.values()]
    bars = axes.barh([_name(label) for label in cached], list(cached.values()), color=colours, height=0.6)
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    axes.set_ylim(len(cached) - 0.25, -0.75)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("look-ups answered by the gradient cache")
    return True


def _by_method(arms: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in sorted(arms.values(), key=lambda arm: arm["n"]):
        found.setdefault(arm["method"], []).append(arm)
    # ∇-Reasoner comes last, and so lies over the others.
    others = [method for method in found if method not in STYLES]
    known = [method for method in STYLES if method not in _OURS]
    return {method: found[method] for method in (*known, *others, *_OURS) if method in found}


def _name(label: str) -> str:
    return label.replace("nabla", "∇-Reasoner")


def _labels(arms: list[dict[str, Any]], x: list[float], y: list[float]) -> list[tuple[str, tuple[float, float]]]:
    """The n of each point; one label for neighbours that lie on each other."""
    labels: list[tuple[list[int], tuple[float, float]]] = []
    for arm, left, top in zip(arms, x, y, strict=True):
        if not arm["n"]:  # as many as the budget allowed
            continue
        if labels and abs(left / labels[-1][1][0] - 1) < 0.03 and abs(top - labels[-1][1][1]) < 0.02:
            labels[-1][0].append(arm["n"])
        else:
            labels.append(([arm["n"]], (left, top)))
    return [(f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]), place) for n, place in labels]


def _style(method: str, shown: Iterable[str]) -> tuple[str, str]:
    """Colour and marker of one of the methods ``shown``."""
    if method in _OURS:
        return STYLES["nabla"]
    if method in STYLES:
        return STYLES[method]
    others = [one for one in shown if one not in STYLES and one not in _OURS]
    return _OTHER_STYLES[others.index(method) % len(_OTHER_STYLES)]
