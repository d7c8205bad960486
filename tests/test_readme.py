"""The figures in the README's sentences are those of the files behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality"


def arms(name):
    return json.loads((RESULTS / name).read_text())["arms"]


def points(found, ours, theirs):
    return round(100 * (found[ours]["accuracy"]["mean"] - found[theirs]["accuracy"]["mean"]))


def test_the_sentences_on_the_bundled_pair():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = arms("arithmetic.json")
    ours, best = found["latents-rollout 16"], found["best-of-n 16"]
    gain = points(found, "latents-rollout 16", "latents-rollout-control 16")
    alone = points(found, "judge-latents-rollout 16", "judge-latents-rollout-control 16")
    assert f"is {gain} points less accurate" in text
    assert f"the gradient brings {alone} points, not {gain}" in text
    assert ours["accuracy"]["mean"] >= best["accuracy"]["mean"], "as accurate as Best-of-16"
    calls, flops = (round(best[cost]["mean"] / ours[cost]["mean"]) for cost in ("model_calls", "flops"))
    assert (calls, flops) == (12, 4), "a twelfth of its model calls and a quarter of its FLOPs"
    assert f"({ours['counters']['rollouts']:.1f} were used on average" in text
    rejected = (100 * found[arm]["rejection_rate"] for arm in ("blind 16", "fresh 16"))
    assert "of whose proposals {:.0f} % are rejected, where it is {:.0f} % with".format(*rejected) in text
    timing = json.loads((RESULTS / "arithmetic-timing.json").read_text())
    seconds = timing["against_best_of_n"]["latents-rollout 4"]["seconds"]
    mean, low, high = (100 * seconds[part] for part in ("mean", "low", "high"))
    assert f"cores it is {mean:.0f} points ahead of Best-of-N ({low:.0f} to {high:.0f};" in text


def test_the_sentences_on_smollm2():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = arms("smollm2-products.json")
    told = []
    for arm in ("latents-rollout 8", "best-of-n 4", "best-of-n 8"):
        told += [100 * found[arm]["accuracy"]["mean"], found[arm]["model_calls"]["mean"]]
    said = "reaches {:.0f} % in {:.0f} model calls, Best-of-4 {:.0f} % in {:.0f} and Best-of-8 {:.0f} % in {:.0f}"
    assert said.format(*told) in text
    assert f"({points(found, 'latents-rollout 8', 'latents-rollout-control 8')} points," in text


def test_the_sentence_on_common_divisors():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = arms("smollm2-gcd.json")
    told = [100 * found["greedy"]["accuracy"]["mean"]]
    for arm in ("latents-rollout 8", "best-of-n 8"):
        told += [100 * found[arm]["accuracy"]["mean"], found[arm]["model_calls"]["mean"]]
    told.append(points(found, "latents-rollout 8", "latents-rollout-control 8"))
    judged = json.loads((RESULTS.parent / "reward_smollm2.json").read_text())["tasks"]["gcd"]["auroc"]
    assert f"right from wrong (AUROC {judged:.2f})" in text
    said = "decoding's {:.0f} %: ∇-Reasoner {:.0f} % in {:.0f} calls, Best-of-8 {:.0f} % in {:.0f}, and the gradient"
    assert f"{said} brings {{:.0f}} points".format(*told) in text


def speed() -> str:
    """The section on speed, without its tables."""
    (section,) = re.findall(
        r"^## Speed and quality\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return " ".join(re.sub(r"<!-- results: .*?<!-- end -->", "", section, flags=re.DOTALL).split())


def test_the_sentence_on_the_demos_reward_model():
    found = json.loads((RESULTS.parent / "reward_smollm2.json").read_text())["products"]
    said = "Best-of-8 by it is right {:.0f} % of the time, greedy decoding {:.0f} %"
    assert said.format(100 * found["best_of_8"], 100 * found["greedy"]) in speed()


def test_no_other_figure_of_speed_stands_outside_a_table():
    figure = r"\d[\d.,]* ?(?:%|×|(?:[MG]iB|µs|ms|s|seconds|minutes|times)\b)"
    assert re.findall(figure, "in 3 s, 1.5× and 7 times as fast, 604 MiB") == ["3 s", "1.5×", "7 times", "604 MiB"]
    assert re.findall(figure, speed()) == ["93 %", "59 %"], "those of the reward model"
