"""The measurement of quality from end to end, at the size of a few problems."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality


@pytest.fixture
def tiny(monkeypatch):
    """Every stage, made to take seconds."""
    monkeypatch.setattr(quality, "SWEEP", {"learning_rate": (0.1, 0.3)})
    for name, method in quality.OWN_METHODS.items():
        monkeypatch.setitem(quality.methods.METHODS, name, method)  # so that it is gone afterwards
    for name, value in {"SAMPLES": (1, 2), "ROLLOUTS": (2,), "VARIANTS": {"": {}}}.items():
        monkeypatch.setattr(quality, name, value)


@pytest.mark.usefixtures("tiny", "one_thread")
def test_tuning_measuring_and_reporting(tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "results"
    quality.tune(work, threads=1, problems=2, rollouts=2)
    tuned = json.loads((work / "tuned.json").read_text())
    assert [*tuned] == ["latents", "logits"]
    assert {*tuned["logits"]} == {"parameterization", "gradient_threshold", "learning_rate"}
    planned = quality.plans(tuned)
    assert planned["logits-control"][1].reward_coeff == 0 != planned["logits"][1].reward_coeff
    assert planned["latents"][1].learning_rate == tuned["latents"]["learning_rate"]

    for runs in ("latents,baselines", "latents-control,blind,fresh"):
        quality.measure(work, threads=1, problems=3, runs=runs)
    lines = (work / "measure" / "latents" / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 3 * len(quality.SEEDS)
    quality.measure(work, threads=1, problems=3, runs="latents")
    assert (work / "measure" / "latents" / "results.jsonl").read_text() == lines, "what is done is not done again"
    with pytest.raises(typer.BadParameter, match="--runs names nothing; use some of baselines, latents"):
        quality.measure(work, threads=1, problems=3, runs="nothing")

    quality.write_report(work, output)
    summary = json.loads((output / "arithmetic.json").read_text())
    arms = {"greedy", "self-consistency 2", "best-of-n 1", "best-of-n 2"}
    assert set(summary["arms"]) == arms | {f"{run} 2" for run in ("latents", "latents-control", "blind", "fresh")}
    text = (output / "README.md").read_text()
    for row in ("| latents 2 |", "| the reward's gradient, latents | 2 |", "| latents-learning_rate-0.3 |"):
        assert row in text
    assert (output / "arithmetic" / "accuracy_over_model_calls.png").stat().st_size > 10_000
