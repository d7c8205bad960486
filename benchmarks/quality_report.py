"""Summaries, tables and plots of what `quality.py` measured.

`quality.py report` writes JSON files and docs/quality_arms.md; `plots.py` makes the other tables and all plots from the
JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import machine, write

from nabla_fast.evaluation import bootstrap, plots, report
from nabla_fast.evaluation.journal import Record

COSTS = {"model_calls": "model calls", "flops": "FLOPs", "seconds": "seconds"}
# What plots and docs/quality.md show, and what they call it; docs/quality_arms.md has every arm.
SHOWN = {
    "greedy": "greedy",
    "self-consistency": "self-consistency",
    "best-of-n": "best-of-n",
    "latents-rollout": "∇-Reasoner",
    "latents-rollout-control": "∇-Reasoner, reward's gradient off",
    "latents-argmax": "∇-Reasoner, published anchor",
    "judge": "best-of-n, a reward taught to judge alone",
}
# All n in docs/quality.md; of the others, which are there for comparison, the largest alone.
WHOLE = ("best-of-n", "judge", "latents-rollout")
SECONDS = (
    "Seconds are to be compared in `arithmetic-timing`, which is for a machine that does nothing else; the other runs "
    "may share theirs."
)
# What README.md shows, ordinary rewards first: file → which models and reward these are, the file of the seconds (None
# where they were not measured), and the arms.
_PROPOSED_ARMS = ("best-of-n 4", "best-of-n 8", "best-of-n 16", "likeliest 8", "dto 8", "guided 8")
BRIEF: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "proposals-whole-judge-long-0": ("arithmetic, taught to judge", "proposals-timing-judge-long-0", _PROPOSED_ARMS),
    "proposals-smollm2-products-ordinary": (
        "SmolLM2-135M, products of one or two digits, taught by answers",
        "proposals-smollm2-products-ordinary",
        ("best-of-n 8", "likeliest 8", "dto 8", "guided 8"),
    ),
    "proposals-smollm2-gcd-ordinary": (
        "SmolLM2-135M, greatest common divisors, taught by answers",
        "proposals-smollm2-gcd-ordinary",
        ("best-of-n 8", "likeliest 8", "dto 8", "guided 8"),
    ),
    "proposals-whole-taught": ("arithmetic, taught to judge and to point", "proposals-timing-taught", _PROPOSED_ARMS),
}
# Proposals, and what the tables call them: as `NablaConfig.proposal` does.
PROPOSED = {
    "likeliest": '`"likeliest"` (control)',
    "dto": '`"dto"`',
    "first_order": '`"first_order"`',
    "prefix_reward": '`"prefix_reward"`',
    "guided": '`"guided"`',
}
# The same in README.md, where nobody has read of proposals yet.
IN_BRIEF = {
    "likeliest": "the likeliest other token, no gradient",
    "dto": "∇-Reasoner",
    "guided": "by prefix rewards while decoding, no gradient",
    "latents-rollout": "∇-Reasoner",
    "latents-rollout-control": "∇-Reasoner, reward's gradient off",
}
NEAR = 0.02
# Runs that differ in one thing: what it is → (with, without).
PAIRS = {
    "the reward's gradient, latents, anchor rollout": ("latents-rollout", "latents-rollout-control"),
    "the reward's gradient, logits, anchor rollout": ("logits-rollout", "logits-rollout-control"),
    "the reward's gradient, latents, anchor argmax": ("latents-argmax", "latents-argmax-control"),
    "the reward's gradient, logits, anchor argmax": ("logits-argmax", "logits-argmax-control"),
    "the reward's gradient, latents, anchor rollout, a reward model taught to judge alone": (
        "judge-latents-rollout",
        "judge-latents-rollout-control",
    ),
    "optimization, where resampling has noise of its own": ("fresh", "blind"),
}


def write_reports(work: Path, output: Path, page: Path) -> None:
    """Writes what ``work`` has runs of: a JSON file for each task, ``page`` with every arm, and plots beside it."""
    lines = [
        "# Quality: every arm",
        "",
        "Made by `python benchmarks/quality.py report`; nothing here is typed by hand. [Quality](quality.md) says what",
        "the arms are and what came out.",
        "",
        SECONDS,
        "",
    ]
    measured = {"arithmetic": work / "measure", "arithmetic-timing": work / "timing"}
    measured |= {f"smollm2-{folder.name}": folder for folder in sorted((work / "smollm2").glob("*"))}
    for name, folder in measured.items():
        runs = {run.name: run for run in sorted(folder.glob("*")) if (run / report.CONFIG).exists()}
        if runs:
            summary = merged(runs)
            write(output / f"{name}.json", {**summary, **_machine()})
            drawn = draw(output / f"{name}.json", page.parent)
            lines += [
                *_section(name, summary),
                *_differences(runs),
                *(f"![{file.stem}]({file.relative_to(page.parent).as_posix()})" for file in drawn),
                "",
            ]
    tuning = sorted((work / "tune").glob("*"))
    if tuning:
        sweep = {run.name: _only(report.summarise(*report.read_run(run))["arms"]) for run in tuning}
        tuned = {file.stem: json.loads(file.read_text()) for file in sorted((work / "tuned").glob("*.json"))}
        write(output / "tuning.json", {"tuned": tuned, "runs": sweep, **_machine()})
        lines += _tuning(sweep)
    page.write_text("\n".join(lines))


def draw(file: Path, docs: Path) -> list[Path]:
    """Plots of a JSON file that `write_reports` wrote, into ``docs``; nothing for other files."""
    summary = json.loads(file.read_text())
    if "against_best_of_n" not in summary or "against_control" in summary:
        return []
    directory = docs / "assets" / "quality" / file.stem
    directory.mkdir(parents=True, exist_ok=True)
    return plots.draw({**summary, "arms": _shown(summary)}, directory)


def merged(runs: Mapping[str, Path]) -> dict[str, Any]:
    """The summary of several runs on one task; an arm of ∇-Reasoner is called after its run."""
    arms: dict[str, list[Record]] = {}
    told: dict[str, dict[str, Any]] = {}
    shown: dict[str, str] = {}
    config: dict[str, Any] = {}
    settings = {}
    for name, folder in runs.items():
        own, records = report.read_run(folder)
        config = config or own
        assert own["task"]["fingerprint"] == config["task"]["fingerprint"], f"{folder} is on other problems"
        settings[name] = own["settings"]
        for label, found in records.items():
            arm = own["arms"][label]
            plain = name == "baselines"
            new = label if plain else f"{name} {arm['n']}"
            arms[new], shown[new] = found, arm["method"] if plain else name
            # ∇-Reasoner by whatever name has the figures of ∇-Reasoner.
            sampled = arm["method"] in ("greedy", "self-consistency", "best-of-n")
            told[new] = {"method": arm["method"] if plain else name if sampled else "nabla", "n": arm["n"]}
    summary = report.summarise({**config, "arms": told}, arms)
    for label, arm in summary["arms"].items():
        arm["method"] = shown[label]
    return {**summary, "settings": settings}


def _section(name: str, summary: Mapping[str, Any]) -> list[str]:
    task = summary["task"]
    lines = [f"## {name}: {task['problems']} problems, seeds {', '.join(map(str, summary['seeds']))}", ""]
    header = ["method", "answers", "accuracy", "95 %", "reward", "rollouts", "model calls", "FLOPs", "seconds"]
    header += ["proposals rejected", "positions skipped"]
    lines += _row(header) + _row(["---"] * len(header))
    for label, arm in summary["arms"].items():
        accuracy = arm["accuracy"]
        lines += _row(
            [
                label,
                str(arm["answers"]),
                _percent(accuracy["mean"]),
                f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}",
                "" if arm["reward"] is None else f"{arm['reward']['mean']:+.2f}",
                f"{arm['counters']['rollouts']:.2f}",
                f"{arm['model_calls']['mean']:.0f}",
                f"{arm['flops']['mean']:.2e}",
                f"{arm['seconds']['mean']:.3f}",
                _percent(arm.get("rejection_rate")),
                _percent(arm.get("skipped_share")),
            ]
        )
    lines += [
        "",
        "Accuracy minus that of Best-of-N at equal cost, in points (95 %); empty where no N costs as much.",
        "",
    ]
    lines += _row(["method", *(f"equal {cost}" for cost in COSTS.values())]) + _row(["---"] * (1 + len(COSTS)))
    for label, found in summary["against_best_of_n"].items():
        lines += _row([label, *(_points(found[cost]) for cost in COSTS)])
    return [*lines, ""]


def _shown(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The arms of the plots, in the order of `SHOWN`, under its names."""
    found = [
        {**arm, "method": name} for method, name in SHOWN.items() for arm in summary["arms"].values()
        if arm["method"] == method
    ]  # fmt: skip
    return {f"{arm['method']} {arm['n']}": arm for arm in found}


def of_task(file: Path) -> str:
    """The table of the arms that the plots show, from a JSON file that `write_reports` wrote."""
    summary = json.loads(file.read_text())
    header = ["method", "accuracy", "95 %", "model calls", "FLOPs", "minus Best-of-N at equal calls, points"]
    lines = _row(header) + _row(["---"] * len(header))
    arms = [(label, arm) for label, arm in summary["arms"].items() if arm["method"] in SHOWN]
    for label, arm in sorted(arms, key=lambda item: [*SHOWN].index(item[1]["method"])):
        if arm["method"] in WHOLE or arm["n"] == max(a["n"] for _, a in arms if a["method"] == arm["method"]):
            against = summary["against_best_of_n"].get(label, {}).get("model_calls")
            lines += _row([_shown_name(arm), *_figures(arm), _points(against)])
    return "\n".join(lines)


def of_proposals(file: Path) -> str:
    """The table of one reward model, from a JSON file that `quality_proposals.py report` wrote."""
    summary = json.loads(file.read_text())
    header = ["method", "accuracy", "95 %", "minus the likeliest other token, points", "model calls", "FLOPs"]
    header += [f"minus Best-of-N at equal {cost}, points" for cost in ("calls", "FLOPs")]
    lines = _row(header) + _row(["---"] * len(header))
    order = [*("greedy", "best-of-n", "blind"), *PROPOSED]
    arms = [(label, arm) for label, arm in summary["arms"].items() if arm["method"] in order]
    for label, arm in sorted(arms, key=lambda item: order.index(item[1]["method"])):
        own = summary["against_control"].get(arm["method"], {}).get("accuracy")
        against = summary["against_best_of_n"].get(label, {})
        costs = [_points(against.get(cost)) for cost in ("model_calls", "flops")]
        name = PROPOSED.get(arm["method"], "resampled without optimization" if arm["method"] == "blind" else None)
        shown = name or arm["method"] + (f", n = {arm['n']}" if arm["method"] == "best-of-n" else "")
        accuracy, interval, *cost = _figures(arm)
        lines += _row([shown, accuracy, interval, _points(own), *cost, *costs])
    return "\n".join(lines)


def of_seconds(results: Path) -> str:
    """What the proposals and Best-of-N take, by `quality_proposals.py timing`."""
    header = ["reward model", "method", "accuracy", "seconds", "minus Best-of-N at equal seconds, points"]
    lines = _row(header) + _row(["---"] * len(header))
    for file in sorted(results.glob("proposals-timing-*.json")):
        summary = json.loads(file.read_text())
        for label, arm in summary["arms"].items():
            shown = PROPOSED.get(arm["method"]) or (label if arm["method"] == "best-of-n" and arm["n"] > 2 else None)
            if shown:
                against = summary["against_best_of_n"].get(label, {}).get("seconds")
                told = [_percent(arm["accuracy"]["mean"]), f"{arm['seconds']['mean']:.2f}"]
                lines += _row([summary["reward"], shown, *told, _points(against)])
    return "\n".join(lines)


def of_probes(results: Path) -> str:
    """What probes said of each reward model, beside what whole evaluations say, where there are some."""
    probed = json.loads((results / "proposals-probes.json").read_text())["rewards"]
    header = [
        "reward model",
        "judges (concordance)",
        *(f"{PROPOSED[name]}, gain" for name in PROPOSED if name != "guided"),
    ]
    header += ["recommended", "recommended without labels", "best when evaluated"]
    lines = _row(header) + _row(["---"] * len(header))
    for name, both in probed.items():
        told = both["with_labels"]
        judges = told["concordance"]["reward"]
        gains = [_points(told["proposals"][own]["gain"]) for own in PROPOSED if own != "guided"]
        said = [str(both[kind]["recommendation"]["proposal"] or "none") for kind in ("with_labels", "without")]
        lines += _row(
            [name, "{mean:.2f} ({low:.2f} to {high:.2f})".format(**judges), *gains, *said, _best(results, name)]
        )
    return "\n".join(lines)


def _best(results: Path, reward: str) -> str:
    """The proposals within two points of the best one with a reward model, by `quality_proposals.py measure`.

    On all problems where that was measured.
    """
    files = [results / f"{stem}-{reward}.json" for stem in ("proposals-whole", "proposals")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return "not measured"
    arms = [arm for arm in json.loads(file.read_text())["arms"].values() if arm["method"] in PROPOSED]
    most = max(arm["accuracy"]["mean"] for arm in arms)
    near = [arm["method"] for arm in arms if arm["accuracy"]["mean"] >= most - NEAR]
    return ", ".join(name for name in PROPOSED if name in near)


def in_brief(results: Path) -> str:
    """The table of README.md."""
    header = ["task, and what the reward was taught", "method", "accuracy", "95 %", "model calls", "FLOPs"]
    header += [f"minus Best-of-N at equal {cost}, points" for cost in ("calls", "FLOPs", "seconds")]
    lines = _row(header) + _row(["---"] * len(header))
    for name, (what, timed, labels) in BRIEF.items():
        summary = json.loads((results / f"{name}.json").read_text())
        seconds = json.loads((results / f"{timed}.json").read_text()) if timed else {"against_best_of_n": {}}
        for label in labels:
            arm, against = summary["arms"][label], summary["against_best_of_n"].get(label, {})
            took = seconds["against_best_of_n"].get(label, {})
            ahead = [_points(against.get(cost)) for cost in ("model_calls", "flops")] + [_points(took.get("seconds"))]
            lines += _row([what, IN_BRIEF.get(arm["method"]) or _shown_name(arm), *_figures(arm), *ahead])
    return "\n".join(lines)


def _shown_name(arm: Mapping[str, Any]) -> str:
    return SHOWN[arm["method"]] + (f", n = {arm['n']}" if arm["method"] != "greedy" else "")


def _figures(arm: Mapping[str, Any]) -> list[str]:
    accuracy = arm["accuracy"]
    return [
        _percent(accuracy["mean"]),
        f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}",
        f"{arm['model_calls']['mean']:.0f}",
        f"{arm['flops']['mean']:.1e}",
    ]


def _differences(runs: Mapping[str, Path]) -> list[str]:
    """What one thing changes, from pairs of runs that are alike but for it."""
    pairs = {what: names for what, names in PAIRS.items() if all(name in runs for name in names)}
    if not pairs:
        return []
    lines = ["Accuracy with minus accuracy without, in points (paired 95 %).", ""]
    lines += _row(["what", "rollouts", "difference"]) + _row(["---"] * 3)
    for what, names in pairs.items():
        # By n, because the two may be methods of different names.
        on, off = (
            {config["arms"][label]["n"]: records for label, records in arms.items()}
            for config, arms in (report.read_run(runs[name]) for name in names)
        )
        for n in (n for n in on if n in off):
            lines += _row([what, str(n), bootstrap.with_interval(report.paired(off[n], on[n])["accuracy"])])
    return [*lines, ""]


def _tuning(sweep: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Tuning split", "", "One setting after the other, the best value of each kept for the next.", ""]
    lines += _row(["run", "accuracy", "95 %", "proposals rejected"]) + _row(["---"] * 4)
    for name, arm in sweep.items():
        accuracy = arm["accuracy"]
        interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
        lines += _row([name, _percent(accuracy["mean"]), interval, _percent(arm.get("rejection_rate"))])
    return [*lines, ""]


def _only(arms: Mapping[str, Any]) -> Any:
    (arm,) = arms.values()
    return arm


def _row(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _points(measure: Mapping[str, float] | None) -> str:
    return "" if measure is None else bootstrap.with_interval(measure)


def _machine() -> dict[str, Any]:
    return {"machine": machine(), "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
