"""The measurement of quality from end to end, at the size of a few problems."""

from __future__ import annotations

import dataclasses
import json

import pytest
import quality
import quality_methods
import typer


@pytest.fixture
def tiny(monkeypatch):
    """Every stage, made to take seconds."""
    monkeypatch.setattr(quality, "SWEEP", {"learning_rate": (0.1, 0.3)})
    for name, method in quality_methods.thrifty().items():
        monkeypatch.setitem(quality.methods.METHODS, name, method)  # so that it is gone afterwards
    for name, value in {
        "SAMPLES": (1, 2),
        "ROLLOUTS": (2,),
        "VARIANTS": {name: quality.VARIANTS[name] for name in ("", "-control")},
    }.items():
        monkeypatch.setattr(quality, name, value)


@pytest.mark.usefixtures("tiny", "one_thread")
def test_tuning_measuring_and_reporting(tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "results"
    quality.tune(work, threads=1, problems=2, rollouts=2, kinds=",".join(quality.KINDS))
    tuned = {file.stem: json.loads(file.read_text()) for file in (work / "tuned").glob("*.json")}
    assert {*tuned} == {"latents-rollout", "latents-argmax", "logits-rollout", "logits-argmax"}
    assert {*tuned["logits-argmax"]} == {*quality.KINDS["logits-argmax"], *quality.START, *quality.SWEEP}
    planned = quality.plans(tuned)
    assert planned["logits-argmax-control"][1].reward_coeff == 0 != planned["logits-argmax"][1].reward_coeff
    assert planned["latents-rollout"][1].learning_rate == tuned["latents-rollout"]["learning_rate"]

    for runs in ("latents-rollout,baselines", "latents-rollout-control,blind,fresh"):
        quality.measure(work, threads=1, problems=3, runs=runs)
    lines = (work / "measure" / "latents-rollout" / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 3 * len(quality.SEEDS)
    quality.measure(work, threads=1, problems=3, runs="latents-rollout")
    assert (work / "measure" / "latents-rollout" / "results.jsonl").read_text() == lines, "what is done stays done"
    with pytest.raises(typer.BadParameter, match="--runs names nothing; use some of baselines, latents-rollout"):
        quality.measure(work, threads=1, problems=3, runs="nothing")

    quality.write_report(work, output, page := tmp_path / "docs" / "arms.md")
    summary = json.loads((output / "arithmetic.json").read_text())
    arms = {"greedy", "self-consistency 2", "best-of-n 1", "best-of-n 2"}
    assert set(summary["arms"]) == arms | {
        f"{run} 2" for run in ("latents-rollout", "latents-rollout-control", "blind", "fresh")
    }
    text = page.read_text()
    with_and_without = "| the reward's gradient, latents, anchor rollout | 2 |"
    for row in ("| latents-rollout 2 |", with_and_without, "| logits-argmax-learning_rate-0.3 |"):
        assert row in text
    on, off = (
        summary["arms"][f"{run} 2"]["accuracy"]["mean"] for run in ("latents-rollout", "latents-rollout-control")
    )
    assert f"{with_and_without} {100 * (on - off):+.1f} (" in text
    assert (tmp_path / "docs/assets/quality/arithmetic/accuracy_over_model_calls.png").stat().st_size > 10_000


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_decoded_twice_and_answers_are_the_same():
    models = quality.bundled()
    task = quality.load_task(quality.ARITHMETIC, max_problems=6)
    config = quality.arithmetic.CONFIG.replace(anchor="rollout", gradient_threshold=None, learning_rate=0.1)
    ids = [models.prompt_ids(problem) for problem in task.problems]
    batch = quality.methods.make_batch(models, task.problems, range(6), task.grader, config, 2, 128)
    thrifty, decoded = quality_methods.thrifty(), []
    plain = {name: quality.methods.METHODS[name] for name in ("best-of-n", "self-consistency", "nabla")}
    for name, method in plain.items():
        for n in (2, 4, 16):
            asked = dataclasses.replace(batch, n=n)
            ours, theirs = thrifty[name](asked), method(asked)
            assert [a.text for a in ours] == [a.text for a in theirs]
            assert [a.stats.counters() for a in ours] == [a.stats.counters() for a in theirs]
            assert [a.reward or 0.0 for a in ours] == pytest.approx([a.reward or 0.0 for a in theirs], rel=1e-4)
            assert [a.flops for a in ours] == [a.flops for a in theirs]

    def count(batch):
        decoded.append((batch.n, len(batch.problems)))
        return plain["nabla"](batch)

    once = quality_methods._once(count)
    spent = {n: sum(a.stats.rollouts == n for a in once(dataclasses.replace(batch, n=n))) for n in (2, 4, 16)}
    assert spent[2] > 0
    assert decoded == [(n, left) for n, left in ((2, len(ids)), (4, spent[2]), (16, spent[4])) if left]
