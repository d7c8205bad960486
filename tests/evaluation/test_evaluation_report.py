"""Intervals, the summary, plots and comparisons, from records made up here."""

from __future__ import annotations

import io
import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nabla_fast.cli import eval_tables
from nabla_fast.cli.console import print_table
from nabla_fast.evaluation import plots, report
from nabla_fast.evaluation.bootstrap import interval, paired_difference
from nabla_fast.evaluation.journal import Journal
from nabla_fast.evaluation.report import at_equal_cost
from nabla_fast.evaluation.runner import CONFIG, RESULTS, SUMMARY, Arm
from nabla_fast.stats import SequenceStats
from nabla_fast.whole_files import write_json

ARMS = (
    Arm("greedy", 1),
    *(Arm("self-consistency", n) for n in (2, 4)),
    *(Arm("best-of-n", n) for n in (2, 4)),
    *(Arm("nabla", n) for n in (2, 4)),
)
PLOTS = {
    "accuracy_over_model_calls.png",
    "accuracy_over_seconds.png",
    "accuracy_over_flops.png",
    "reward.png",
    "cache_hit_rate.png",
}
values = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(values)
def test_an_interval_holds_its_mean_and_stays_within_the_values(data):
    found = interval(data, resamples=200)
    assert found.low <= found.mean <= found.high
    slack = 1e-9
    assert min(data) - slack <= found.low
    assert found.high <= max(data) + slack
    assert found == interval(data, resamples=200)


@settings(max_examples=20, deadline=None)
@given(values, st.floats(-5, 5))
def test_a_constant_shift_is_a_paired_difference_without_spread(data, shift):
    found = paired_difference([x + shift for x in data], data)
    assert [found.low, found.mean, found.high] == pytest.approx([shift] * 3, abs=1e-9)


def test_an_interval_has_the_width_that_theory_gives():
    data = (np.arange(400) % 4 == 0).astype(float)
    found = interval(data.tolist())
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.mean == 0.25
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = interval(generator.random(80) < 0.6, resamples=400)
        covered += found.low <= 0.6 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="values is empty"):
        interval([])
    with pytest.raises(ValueError, match="ours has 1 values and theirs 2"):
        paired_difference([1.0], [1.0, 2.0])


def record(arm, seed, problem, right, **more):
    counters = {**SequenceStats().counters(), "rollouts": arm.n, "generated_tokens": 20 * arm.n}
    if arm.method == "nabla":
        counters |= {"rejections": 1, "cache_hits": 6, "cache_misses": 2, "gradient_evaluations": 2}
        counters |= {"skipped_positions": 9, "optimised_positions": 1}
    return {
        "method": arm.method,
        "n": arm.n,
        "seed": seed,
        "problem": problem,
        "right": right,
        "answer": "1",
        "reference": "1",
        "error": None,
        "text": "1",
        "tokens": 5,
        "reward": None if arm.method == "self-consistency" else 0.5 + 0.1 * arm.n,
        "reward_before": None if arm.method == "self-consistency" else 0.5,
        **counters,
        "model_calls": 21.0 * arm.n,
        "flops": 1e9 * arm.n,
        "seconds": 0.1 * arm.n,
        "phases": {},
        **more,
    }


def write_run(directory, right, *, arms=ARMS, fingerprint="f", more=()):
    """A run of 20 problems and two seeds; ``right`` says what is right."""
    directory.mkdir()
    task = {"name": "made up", "problems": 20, "fingerprint": fingerprint}
    told = {arm.label: {"method": arm.method, "n": arm.n} for arm in arms}
    write_json(directory / CONFIG, {"task": task, "arms": told, "seeds": [0, 1], "models": {}, "settings": {}})
    with Journal(directory / RESULTS) as journal:
        for arm in arms:
            for seed in (0, 1):
                for i in range(20):
                    journal.append(record(arm, seed, f"p{i:02d}", right(arm, seed, i)))
        for line in more:
            journal.append(line)
    return directory


def test_a_summary_has_means_over_problems_and_seeds(tmp_path):
    run = write_run(tmp_path / "run", lambda arm, seed, i: i < 10 or (seed == 1 and i < 14))
    summary = report.write_report(run)
    assert json.loads((run / SUMMARY).read_text()) == summary
    arm = summary["arms"]["nabla 4"]
    assert arm["accuracy"]["mean"] == pytest.approx(0.6)
    assert 0.3 < arm["accuracy"]["low"] < 0.6 < arm["accuracy"]["high"] < 0.9
    assert (arm["problems"], arm["answers"], arm["failed"]) == (20, 40, 0)
    assert arm["reward"]["mean"] == pytest.approx(0.9)
    assert arm["counters"]["generated_tokens"] == 80
    assert arm["cache_hit_rate"] == 0.75
    assert arm["rejection_rate"] == pytest.approx(1 / 3)
    assert arm["skipped_share"] == 0.9
    assert summary["arms"]["greedy"]["cache_hit_rate"] is None
    assert summary["arms"]["self-consistency 2"]["reward"] is None


def test_failures_are_counted_and_in_no_mean(tmp_path):
    failed = {**record(ARMS[0], 0, "p00", None), "error": "ValueError: no"}
    for name in ("text", "reward", "model_calls", "seconds", "flops"):
        del failed[name]
    run = write_run(tmp_path / "run", lambda *_: True, more=[failed])
    arm = report.write_report(run)["arms"]["greedy"]
    assert arm["failed"] == 1
    assert (arm["problems"], arm["answers"]) == (20, 39)
    assert arm["accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_every_plot_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", lambda arm, seed, i: i < 8 + arm.n)
    summary = report.write_report(run)
    pictures = {file.name: file.read_bytes() for file in run.glob("*.png")}
    assert set(pictures) == PLOTS
    for content in pictures.values():
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5_000
    empty = {**summary, "arms": {}}
    (tmp_path / "empty").mkdir()
    assert plots.draw(empty, tmp_path / "empty") == []


def test_a_run_without_results_or_with_nothing_but_failures_has_a_summary(tmp_path):
    run = write_run(tmp_path / "run", lambda *_: True, arms=ARMS[:1])
    (run / RESULTS).unlink()
    arm = report.write_report(run)["arms"]["greedy"]
    assert arm["accuracy"] is None
    assert arm["counters"]["model_calls"] is None
    text = rendered(eval_tables.show_summary, report.write_report(run))
    assert "greedy" in text


def rendered(show, told, width=80):
    """What ``show`` prints, as a terminal of some width shows it."""
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_tables, "print_table", partial(print_table, console=console))
        show(told)
    return console.file.getvalue()


def test_the_table_shows_every_method(tmp_path):
    run = write_run(tmp_path / "run", lambda arm, seed, i: i < 12)
    text = rendered(eval_tables.show_summary, report.write_report(run))
    for expected in ("greedy", "best-of-n 4", "nabla 2", "60.0%", "75%", "FLOPs", "4.0e+09", "+0.900"):
        assert expected in text
    assert "…" not in text


def test_a_comparison_pairs_problems(tmp_path):
    first = write_run(tmp_path / "first", lambda arm, seed, i: i < 10)
    second = write_run(tmp_path / "second", lambda arm, seed, i: i < 12, arms=ARMS[:-1])
    comparison = report.compare(first, second)
    difference = comparison["arms"]["nabla 2"]["differences"]["accuracy"]
    assert difference["mean"] == pytest.approx(0.1)
    assert 0 <= difference["low"] < 0.1 < difference["high"] < 0.3
    assert comparison["arms"]["nabla 2"]["differences"]["model_calls"]["mean"] == 0
    assert comparison["arms"]["nabla 4"]["second"] is None
    assert comparison["arms"]["nabla 4"]["differences"] == {}
    assert "reward" not in comparison["arms"]["self-consistency 2"]["differences"]
    text = rendered(eval_tables.show_comparison, comparison)
    assert "+10.0 (" in text
    json.dumps(comparison)


def test_runs_on_other_problems_are_not_compared(tmp_path):
    first = write_run(tmp_path / "first", lambda *_: True)
    second = write_run(tmp_path / "second", lambda *_: True, fingerprint="g")
    with pytest.raises(ValueError, match="give runs on the same"):
        report.compare(first, second)
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*none, so it holds no run"):
        report.compare(first, tmp_path / "none")


def test_a_configuration_of_something_else_is_refused(tmp_path):
    (tmp_path / CONFIG).write_text('{"arms": 3}')
    with pytest.raises(ValueError, match="did not write"):
        report.read_run(tmp_path)


def point(cost, *right):
    return cost, {f"p{i}": float(value) for i, value in enumerate(right)}


def test_equal_cost_is_interpolated_in_the_logarithm_problem_by_problem():
    curve = [point(100, 1, 1, 1, 0), point(10, 0, 1, 0, 0), point(1000, 1, 1, 1, 1)]
    found = at_equal_cost(point(10**1.5, 1, 1, 0, 0), curve)
    # Halfway between 10 and 100 the curve has 0.5, 1, 0.5, 0.
    assert found["mean"] == pytest.approx((0.5 + 0 - 0.5 + 0) / 4)
    assert found["low"] < 0 < found["high"]
    assert at_equal_cost(point(100, 1, 1, 1, 0), curve)["mean"] == 0
    assert at_equal_cost(point(1000, 1, 1, 1, 1), curve)["mean"] == 0
    for outside in (9.9, 1001):
        assert at_equal_cost(point(outside, 1, 1, 1, 1), curve) is None
    assert at_equal_cost(point(50, 1, 1, 1, 1), curve[:1]) is None
    assert at_equal_cost((50, {"other": 1.0}), curve) is None


def test_nabla_is_set_against_best_of_n_at_equal_cost(tmp_path):
    arms = (*ARMS, Arm("best-of-n", 32))
    run = write_run(tmp_path / "run", lambda arm, seed, i: i < 10 + (arm.method == "nabla"), arms=arms)
    summary = report.write_report(run)
    found = summary["against_best_of_n"]
    assert set(found) == {arm.label for arm in arms if arm.method == "nabla"}
    costs = {label: arm["model_calls"]["mean"] for label, arm in summary["arms"].items()}
    for label, differences in found.items():
        inside = costs["best-of-n 2"] <= costs[label] <= costs["best-of-n 32"]
        assert (differences["model_calls"] is not None) == inside
        if inside:
            assert differences["model_calls"]["mean"] == pytest.approx(0.05)
    assert any(d["model_calls"] for d in found.values())
    assert "equal cost" in rendered(eval_tables.show_summary, summary)
    alone = report.write_report(write_run(tmp_path / "alone", lambda *_: True, arms=[Arm("nabla", 4)]))
    assert alone["against_best_of_n"] == {}
