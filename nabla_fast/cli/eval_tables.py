"""The tables of `nabla-fast eval`: a run's summary, and two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from nabla_fast.cli.console import print_table

_COSTS = {"model_calls": "model calls", "flops": "FLOPs", "seconds": "seconds"}


def show_summary(summary: Mapping[str, Any]) -> None:
    """Prints quality, cost and, where both were run, nabla against Best-of-N at equal cost."""
    from nabla_fast.evaluation.bootstrap import with_interval

    quality, cost = [], []
    budget = summary.get("budget")
    for label, arm in summary["arms"].items():
        reward = [_figure(arm, name, "+.3f") for name in ("reward_before", "reward")]
        failed = Text(str(arm["failed"]), style="red" if arm["failed"] else "")
        share = (_figure(arm, "budget_share", ".0%"),) if budget else ()
        spread = [f"{100 * arm['accuracy'][end]:.0f}" for end in ("low", "high")] if arm["accuracy"] else ["-"]
        quality.append((label, _figure(arm, "accuracy", ".1%"), " to ".join(spread), *reward, *share, failed))
        counters, ends = arm["counters"], arm["finish_reasons"]
        cut = f"{ends.get('length', 0) / sum(ends.values()):.0%}" if ends else "-"
        cost.append(
            (
                label,
                _figure(arm, "model_calls", ".0f"),
                _figure(counters, "generated_tokens", ".0f"),
                cut,
                _figure(counters, "gradient_evaluations", ".1f"),
                _figure(arm, "cache_hit_rate", ".0%"),
                _figure(arm, "seconds", ".3g"),
                _figure(arm, "flops", ".1e"),
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
        print_table(
            title, ("method", "difference"), [(label, with_interval(found)) for label, found in with_this.items()]
        )
    if summary["against_best_of_n"]:
        title = "accuracy minus Best-of-N's at equal cost, in points, 95 % intervals; - where no N costs as much"
        found = summary["against_best_of_n"].items()
        rows = [(label, *(with_interval(differences[name]) for name in _COSTS)) for label, differences in found]
        print_table(title, ("method", *(f"equal\n{cost}" for cost in _COSTS.values())), rows)


def show_comparison(comparison: Mapping[str, Any]) -> None:
    """Prints two runs side by side: quality and cost; a difference that may be noise has 0 in its interval."""
    from nabla_fast.evaluation.bootstrap import with_interval

    quality, cost = [], []
    for label, arm in comparison["arms"].items():
        sides = [arm["first"], arm["second"]]
        accuracy = [_figure(side, "accuracy", ".1%") for side in sides]
        quality.append((label, *accuracy, with_interval(arm["differences"].get("accuracy"))))
        seconds = _side_by_side(sides, "seconds", ".3g")
        cost.append((label, *_side_by_side(sides, "model_calls", ".0f"), *seconds))
    runs = f"A is {comparison['first']}, B is {comparison['second']}; paired 95 % intervals"
    title = f"{comparison['task']['name']}: {runs}"
    print_table(title, ("method", "accuracy A", "accuracy B", "B - A in points"), quality)
    columns = ("method", "calls A", "calls B", "calls\nB / A", "seconds\nA", "seconds\nB", "seconds\nB / A")
    print_table("cost per problem", columns, cost)


def _figure(figures: Mapping[str, Any] | None, name: str, form: str) -> str:
    """A figure, or the mean of one with an interval; "-" where there is none."""
    value = None if figures is None else figures[name]
    value = value["mean"] if isinstance(value, Mapping) else value
    return "-" if value is None else format(value, form)


def _side_by_side(sides: Sequence[Mapping[str, Any] | None], name: str, form: str) -> list[str]:
    """A measure of both runs, and the second over the first."""
    first, second = (None if side is None or side[name] is None else side[name]["mean"] for side in sides)
    ratio = f"{second / first:.2f}" if first and second is not None else "-"
    return [*(_figure(side, name, form) for side in sides), ratio]
