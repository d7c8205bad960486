"""What a run says: a summary with intervals, plots, and two runs side by side."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from nabla_fast.evaluation import plots
from nabla_fast.evaluation.bootstrap import LEVEL, RESAMPLES, interval, paired_difference
from nabla_fast.evaluation.budget import COSTS
from nabla_fast.evaluation.journal import Record, read_records
from nabla_fast.evaluation.methods import PROPOSALS, SEARCHES
from nabla_fast.evaluation.records import COUNTERS, latest, require_records
from nabla_fast.evaluation.runner import CONFIG, RESULTS, SUMMARY, read_json
from nabla_fast.whole_files import write_json

# Each gets an interval over problems.
_MEASURES = ("accuracy", "reward", "reward_before", "model_calls", "seconds", "flops")
_COSTS = ("model_calls", "flops", "seconds")
_DIFFERENCES = ("accuracy", "reward", "model_calls", "seconds", "flops")

Arms = dict[str, list[Record]]
"""Label → records, the failed ones among them."""
Point = tuple[float, Mapping[str, float]]
"""A method at one n: its mean cost per problem, above 0, and problem id → share of right answers."""


def read_run(directory: Path) -> tuple[dict[str, Any], Arms]:
    """Configuration and results of a run, finished or not.

    Raises:
        FileNotFoundError: if ``directory`` holds no run.
        ValueError: if its files are not those of a run.
    """
    config = read_json(directory / CONFIG)
    file = directory / RESULTS
    records = read_records(file) if file.exists() else []
    require_records(file, records)
    try:
        labels = {(arm["method"], arm["n"]): label for label, arm in config["arms"].items()}
        arms: Arms = {label: [] for label in config["arms"]}
        _ = config["models"], config["seeds"], [config["task"][name] for name in ("name", "problems", "fingerprint")]
        _ = (budget := config.get("budget")) and (COSTS[budget["kind"]], 1 / budget["amount"])
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{directory} holds a {CONFIG} that nabla-fast eval did not write: {error!r}") from error
    for number, record in enumerate(records, start=1):
        if (record["method"], record["n"]) not in labels:
            raise ValueError(
                f"line {number} of {file} is of {record['method']} {record['n']}, which its {CONFIG} does not name"
            )
    for record in latest(records):
        arms[labels[record["method"], record["n"]]].append(record)
    return config, arms


def summarise(config: Mapping[str, Any], arms: Arms) -> dict[str, Any]:
    """Figures of every method and n, as plain data.

    A measure is the mean over problems of its mean over seeds, with a 95 % bootstrap interval over problems. Failed
    problems are counted, and are in no mean. Of a run with a budget, arms say what share of it they have spent, and
    are compared with Best-of-N as they are: its budget is the same.
    """
    budget: Mapping[str, Any] | None = config.get("budget")
    figures = {label: _arm(config["arms"][label], records) for label, records in arms.items()}
    if budget:
        for arm in figures.values():
            cost = arm[COSTS[budget["kind"]]]
            arm["budget_share"] = None if cost is None else cost["mean"] / budget["amount"]
    return {
        "task": config["task"],
        "models": config["models"],
        "seeds": config["seeds"],
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "problems"},
        "budget": budget,
        "arms": figures,
        "against_best_of_n": {} if budget else _against_best_of_n(config["arms"], arms),
        "against_best_of_n_with_budget": _with_this_budget(config["arms"], arms) if budget else {},
    }


def write_report(directory: Path) -> dict[str, Any]:
    """Writes ``summary.json`` and the plots of the run in ``directory``; returns the summary.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.

    Warns:
        UserWarning: if matplotlib is not installed, so that there are no plots.
    """
    config, arms = read_run(directory)
    summary = summarise(config, arms)
    write_json(directory / SUMMARY, summary)
    try:
        plots.draw(summary, directory)
    except ImportError as error:
        warnings.warn(f"no plots: {error}", stacklevel=2)
    return summary


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Two runs on the same problems side by side, as plain data.

    Returns:
        ``arms``: label → the figures of each run (None where it has none), and for every measure that both have
        ``differences``, second minus first: mean and paired bootstrap interval over the problems that both finished.

    Raises:
        FileNotFoundError, ValueError: as `read_run`; ValueError also if the runs are on different problems.
    """
    (config, arms), (other_config, other_arms) = read_run(first), read_run(second)
    tasks = [config["task"], other_config["task"]]
    if tasks[0].get("fingerprint") != tasks[1].get("fingerprint"):
        told = [f"{task['name']} ({task['problems']} problems, {task['fingerprint']})" for task in tasks]
        raise ValueError(f"--compare: {first} is a run on {told[0]} and {second} on {told[1]}; give runs on the same")
    told_arms = {}
    for label in dict.fromkeys([*arms, *other_arms]):
        figures: list[dict[str, Any] | None] = [
            _arm(run["arms"][label], records[label]) if label in records else None
            for run, records in ((config, arms), (other_config, other_arms))
        ]
        differences = paired(arms.get(label, []), other_arms.get(label, []))
        told_arms[label] = {"first": figures[0], "second": figures[1], "differences": differences}
    return {"task": config["task"], "first": str(first), "second": str(second), "arms": told_arms}


def _arm(arm: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    good = [record for record in records if record["error"] is None]
    figures: dict[str, Any] = {
        "method": arm["method"],
        "n": arm["n"],
        "problems": len({record["problem"] for record in good}),
        "answers": len(good),
        "failed": len(records) - len(good),
    }
    for name in _MEASURES:
        values = list(_by_problem(good, name).values())
        figures[name] = asdict(interval(values)) if values else None
    figures["finish_reasons"] = dict(Counter(r["finish_reason"] for r in good if r.get("finish_reason")))
    figures["counters"] = {name: _ratio(_total(good, name), len(good)) for name in COUNTERS}
    looked_up = _total(good, "cache_hits") + _total(good, "cache_misses")
    positions = _total(good, "skipped_positions") + _total(good, "optimised_positions")
    figures["cache_hit_rate"] = _ratio(_total(good, "cache_hits"), looked_up)
    if arm["method"] in PROPOSALS:
        proposals = _total(good, "rollouts") - len(good)
        figures["rejection_rate"] = _ratio(_total(good, "rejections"), proposals)
        figures["skipped_share"] = _ratio(_total(good, "skipped_positions"), positions)
    return figures


def _against_best_of_n(told: Mapping[str, Any], arms: Arms) -> dict[str, dict[str, dict[str, float] | None]]:
    """Label of an arm that searches by the reward → cost → accuracy minus Best-of-N's at it; {} without Best-of-N."""
    good = {label: [r for r in records if r["error"] is None] for label, records in arms.items()}
    good = {label: records for label, records in good.items() if records}
    curve = [label for label in good if told[label]["method"] == "best-of-n"]
    compared = [label for label in good if curve and told[label]["method"] in (*PROPOSALS, *SEARCHES)]
    return {
        label: {
            cost: at_equal_cost(_point(good[label], cost), [_point(good[n], cost) for n in curve]) for cost in _COSTS
        }
        for label in compared
    }


def at_equal_cost(ours: Point, curve: Sequence[Point]) -> dict[str, float] | None:
    """Accuracy of ``ours`` minus that of ``curve`` at the cost of ``ours``, with a paired bootstrap interval.

    The curve is interpolated linearly in the logarithm of the cost between its neighbouring points, for each problem.

    Returns:
        None where the cost lies outside the curve (nothing is extrapolated), or no problem is common to the points.
    """
    cost, accuracy = ours
    for (low, below), (high, above) in pairwise(sorted(curve, key=lambda point: point[0])):
        if low <= cost <= high:
            share = 0.0 if low == high else math.log(cost / low) / math.log(high / low)
            both = [p for p in accuracy if p in below and p in above]
            theirs = [(1 - share) * below[p] + share * above[p] for p in both]
            return asdict(paired_difference([accuracy[p] for p in both], theirs)) if both else None
    return None


def _with_this_budget(told: Mapping[str, Any], arms: Arms) -> dict[str, dict[str, float] | None]:
    """Label of an arm that searches by the reward → accuracy minus Best-of-N's; None without a problem in common."""
    theirs = [records for label, records in arms.items() if told[label]["method"] == "best-of-n"]
    compared = [label for label in arms if told[label]["method"] in (*PROPOSALS, *SEARCHES)]
    return {label: paired(theirs[0], arms[label]).get("accuracy") for label in compared if theirs}


def _point(records: Sequence[Record], cost: str) -> Point:
    costs = _by_problem(records, cost).values()
    return sum(costs) / len(costs), _by_problem(records, "accuracy")


def paired(first: Sequence[Record], second: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Measure → second minus first, over the problems that both finished, with a paired bootstrap interval."""
    differences = {}
    for name in _DIFFERENCES:
        ours, theirs = (_by_problem([r for r in records if r["error"] is None], name) for records in (second, first))
        both = [problem for problem in ours if problem in theirs]
        if both:
            found = paired_difference([ours[problem] for problem in both], [theirs[problem] for problem in both])
            differences[name] = asdict(found)
    return differences


def _by_problem(records: Sequence[Record], measure: str) -> dict[str, float]:
    """Problem → mean over seeds, of the records that have the measure; in the order of the ids, not of the finish."""
    field = "right" if measure == "accuracy" else measure
    values: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda record: (record["problem"], record["seed"])):
        if record[field] is not None:
            values.setdefault(record["problem"], []).append(float(record[field]))
    return {problem: sum(found) / len(found) for problem, found in values.items()}


def _total(records: Sequence[Record], field: str) -> int:
    return sum(int(record[field]) for record in records)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
