"""The tables of `nabla-fast eval`: a run's summary, and two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from nabla_fast.cli.console import print_table

_COSTS = {"model_calls": "model calls", "flops": "FLOPs", "seconds": "seconds"}


def show_summary(summary: Mapping[str, Any]) -> None:
    """Prints quality, cost and, where both were run, nabla against Best-of-N at equal cost."""
    from nabla_fast.evaluation.report import points

    quality, cost = [], []
    budget = summary.get("budget")
    for label, arm in summary["arms"].items():
        reward = [_number(_mean(arm[name]), "+.3f") for name in ("reward_before", "reward")]
        failed = Text(str(arm["failed"]), style="red" if arm["failed"] else "")
        share = (_number(arm["budget_share"], ".0%"),) if budget else ()
        accuracy = _number(_mean(arm["accuracy"]), ".1%"), _percent(arm["accuracy"])
        quality.append((label, *accuracy, *reward, *share, failed))
        counters, ends = arm["counters"], arm["finish_reasons"]
        cut = ends.get("length", 0) / sum(ends.values()) if ends else None
        cost.append(
            (
                label,
                _number(_mean(arm["model_calls"]), ".0f"),
                _number(counters["generated_tokens"], ".0f"),
                _number(cut, ".0%"),
                _number(counters["gradient_evaluations"], ".1f"),
                _number(arm["cache_hit_rate"], ".0%"),
                _number(_mean(arm["seconds"]), ".3g"),
                _number(_mean(arm["flops"]), ".1e"),
            )
        )
    told = f", budget {budget['kind']}={budget['amount']:g}" if budget else ""
    title = f"{summary['task']['name']}{told}: means per problem, 95 % bootstrap intervals"
    columns = ("accuracy", "interval", "reward\nbefore", "reward", *(("of\nbudget",) if budget else ()), "failed")
    print_table(title, ("method", *columns), quality)
    columns = ("model\ncalls", "tokens", "finish:\nlength", "gradients", "cache\nhits", "seconds", "FLOPs")
    print_table("cost per problem", ("method", *columns), cost)
    if with_this := summary.get("against_best_of_n_with_budget"):
        title = "accuracy minus Best-of-N's with the same budget, in points, 95 % intervals"
        print_table(title, ("method", "difference"), [(label, points(found)) for label, found in with_this.items()])
    if summary["against_best_of_n"]:
        title = "accuracy minus Best-of-N's at equal cost, in points, 95 % intervals; - where no N costs as much"
        found = summary["against_best_of_n"].items()
        rows = [(label, *(points(differences[name]) for name in _COSTS)) for label, differences in found]
        print_table(title, ("method", *(f"equal\n{cost}" for cost in _COSTS.values())), rows)


def show_comparison(comparison: Mapping[str, Any]) -> None:
    """Prints two runs side by side: quality and cost; a difference that may be noise has 0 in its interval."""
    from nabla_fast.evaluation.report import points

    quality, cost = [], []
    for label, arm in comparison["arms"].items():
        sides = [arm["first"], arm["second"]]
        accuracy = [_number(_side(side, "accuracy"), ".1%") for side in sides]
        quality.append((label, *accuracy, points(arm["differences"].get("accuracy"))))
        seconds = _side_by_side(sides, "seconds", ".3g")
        cost.append((label, *_side_by_side(sides, "model_calls", ".0f"), *seconds))
    runs = f"A is {comparison['first']}, B is {comparison['second']}; paired 95 % intervals"
    title = f"{comparison['task']['name']}: {runs}"
    print_table(title, ("method", "accuracy A", "accuracy B", "B - A in points"), quality)
    columns = ("method", "calls A", "calls B", "calls\nB / A", "seconds\nA", "seconds\nB", "seconds\nB / A")
    print_table("cost per problem", columns, cost)


def _mean(measure: Mapping[str, float] | None) -> float | None:
    return None if measure is None else measure["mean"]


def _side(figures: Mapping[str, Any] | None, name: str) -> float | None:
    return None if figures is None else _mean(figures[name])


def _side_by_side(sides: Sequence[Mapping[str, Any] | None], name: str, form: str) -> list[str]:
    """A figure of both runs, and the second over the first."""
    first, second = (_side(side, name) for side in sides)
    ratio = second / first if first and second is not None else None
    return [_number(first, form), _number(second, form), _number(ratio, ".2f")]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(measure: Mapping[str, float] | None) -> str:
    return "-" if measure is None else f"{100 * measure['low']:.0f} to {100 * measure['high']:.0f}"
