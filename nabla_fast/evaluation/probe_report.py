"""Figures of a probe: how good each proposal's choices are, what they cost, and which one to use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from nabla_fast.evaluation.bootstrap import LEVEL, RESAMPLES, interval, with_interval
from nabla_fast.evaluation.probe import Candidate, Fork, Probe
from nabla_fast.whole_files import write_json

CONTROL = "likeliest"
GUIDED = "guided"
"""What "prefix_reward" chooses, taken without a look at where it leads."""
RESULTS, PLOT = "probe.json", "probe.png"
# Of the proposals that look at where a token leads, the cheapest first: what a tie goes to.
BY_COST = (CONTROL, "prefix_reward", "first_order", "dto")
CHANCE = 0.5
NEARLY = 0.95
UNLABELLED = "Without a verifier this says what the reward likes, not what is right."


def figures(probe: Probe, *, labels: bool) -> dict[str, Any]:
    """What the forks say, as plain data.

    Precision at 1 is the share of mendable forks at which a proposal chose a token that mends the answer. With labels,
    a fork is mendable if the answer is wrong and a candidate's rollout right; without, if a candidate's rollout has a
    higher reward than the answer, and what mends is the candidate with the highest.

    Gain is what a proposal adds a fork, all forks alike: what its choice was rolled out to minus the answer as it was
    drawn, where the reward rose, else 0. With labels this is a change of accuracy, without one of reward. "guided"
    takes every choice, whatever the reward says.

    Concordance is the share of pairs, of one fork and not equal in the second figure, that two figures order alike; 0.5
    is chance.

    Every interval is a bootstrap over problems.

    Args:
        labels: whether `Candidate.right` says what is right; else the rewards are what is to be reached.
    """
    mendable = [fork for fork in probe.forks if _mends(fork, labels)]
    proposals = {name: _proposal(name, probe.forks, mendable, labels=labels) for name in (*BY_COST, GUIDED)}
    concordance = _concordances(probe.forks, labels=labels)
    told = {
        "labels": "verifier" if labels else "best re-rolled reward",
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "problems"},
        "answers": len(probe.answers),
        "accuracy": _interval([float(bool(answer.right)) for answer in probe.answers]) if labels else None,
        "forks": len(probe.forks),
        "mendable_forks": len(mendable),
        "proposals": proposals,
        "concordance": concordance,
        "mistakes": _mistakes(probe, mendable, labels=labels),
    }
    recommended = recommendation(told)
    if not labels:
        recommended["why"] += f" {UNLABELLED}"
    return {**told, "recommendation": recommended}


def recommendation(told: Mapping[str, Any]) -> dict[str, Any]:
    """Which proposal to use, None where none can help, and why in a sentence; from the other `figures`.

    One is recommended above the control if its gain is larger with the whole of its interval; of several the cheapest
    that reaches `NEARLY` the largest gain.
    """
    proposals, judges = told["proposals"], told["concordance"]["reward"]
    how = (100, "+.1f", " points of accuracy") if told["labels"] == "verifier" else (1, "+.3f", " of reward")
    if not told["mendable_forks"]:
        return {"proposal": None, "why": "No fork was found at which another token mends the answer; look at more."}
    if judges is not None and judges["low"] <= CHANCE:
        told_range = "{mean:.2f}, {low:.2f} to {high:.2f}".format(**judges)
        why = (
            f"This reward does not tell right answers from wrong ones here (concordance {told_range}): no proposal can "
            "help; use greedy decoding or self-consistency."
        )
        return {"proposal": None, "why": why}
    better = [name for name in BY_COST if name != CONTROL and proposals[name]["gain_over_control"]["low"] > 0]
    if better:
        largest = max(proposals[name]["gain"]["mean"] for name in better)
        name = next(own for own in better if proposals[own]["gain"]["mean"] >= NEARLY * largest)
        gained = with_interval(proposals[name]["gain_over_control"], *how)
        return {"proposal": name, "why": f"Use {name}: beside the likeliest other token it brings {gained} a fork."}
    first, prefix = (
        with_interval(proposals[name]["gain_over_control"], *how) for name in ("first_order", "prefix_reward")
    )
    why = (
        f"Use likeliest: beside the likeliest other token, this reward's gradient brings {first} a fork and its score "
        f"of prefixes {prefix}, neither of them a gain for certain."
    )
    return {"proposal": CONTROL, "why": why}


def prepare(directory: Path) -> None:
    """Makes the directory of a probe's files.

    Raises:
        ValueError: if it holds a probe already, which would be lost.
        OSError: if it cannot be made.
        ImportError: if matplotlib, which draws the plot, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--out asks for a plot, which needs matplotlib; run pip install "nabla_fast[eval]"')
    if (directory / RESULTS).exists():
        raise ValueError(f"--out is {directory}, which holds a probe already; give another directory")
    directory.mkdir(parents=True, exist_ok=True)


def write(directory: Path, probe: Probe, told: Mapping[str, Any]) -> None:
    """Writes ``probe.json``, with the figures ``told``, every answer and every fork, and ``probe.png``."""
    found = asdict(probe)
    write_json(directory / RESULTS, {**told, "all_answers": found["answers"], "all_forks": found["forks"]})
    draw(told, directory / PLOT)


def draw(told: Mapping[str, Any], file: Path) -> None:
    """Draws precision at 1 and gain of every proposal. Raises ImportError if matplotlib is not installed."""
    from matplotlib.figure import Figure

    names = list(told["proposals"])
    figure = Figure(figsize=(8.4, 0.5 * len(names) + 1.6), layout="constrained")
    labelled = told["labels"] == "verifier"
    unit = 100 if labelled else 1
    panels = (
        ("precision_at_1", 100, "choices that mend a mendable fork, %"),
        ("gain", unit, "gain a fork, points of accuracy" if labelled else "gain a fork, reward"),
    )
    for axes, (name, scale, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for row, proposal in enumerate(names):
            own = told["proposals"][proposal][name]
            if own is not None:
                low, mean, high = (scale * own[part] for part in ("low", "mean", "high"))
                colour = "#8A8A8A" if proposal == CONTROL else "#C2104B"
                axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        control = told["proposals"].get(CONTROL, {}).get(name)
        if control is not None:
            axes.axvline(scale * control["mean"], color="#8A8A8A", linewidth=0.8, linestyle=":")
        axes.set_xlabel(title)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.25)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(file, dpi=150)


def _proposal(name: str, forks: Sequence[Fork], mendable: Sequence[Fork], *, labels: bool) -> dict[str, Any]:
    chooses = "prefix_reward" if name == GUIDED else name

    def gain(fork: Fork, proposal: str = name) -> float:
        new = fork.of("prefix_reward" if proposal == GUIDED else proposal)
        taken = proposal == GUIDED or new.reward > fork.present.reward
        return _value(new, labels) - _value(fork.present, labels) if taken else 0.0

    def calls(fork: Fork) -> float:
        new = fork.of(chooses)
        return fork.calls[chooses] + (new.tokens + 1 if name != GUIDED and new is not fork.present else 0)

    def mends(fork: Fork, proposal: str = chooses) -> float:
        return float(_is_best(fork, fork.of(proposal), labels))

    changed = [fork for fork in forks if fork.of(chooses) is not fork.present]
    return {
        "precision_at_1": _over(mendable, mends),
        "precision_over_control": _over(mendable, lambda fork: mends(fork) - mends(fork, CONTROL)),
        "gain": _over(forks, gain),
        "gain_over_control": _over(forks, lambda fork: gain(fork) - gain(fork, CONTROL)),
        "proposed": len(changed) / max(len(forks), 1),
        "accepted": sum(fork.of(chooses).reward > fork.present.reward for fork in changed) / max(len(changed), 1),
        "model_calls": _mean([calls(fork) for fork in forks]),
        "seconds_to_choose": _mean([fork.seconds[chooses] for fork in forks]),
    }


def _mends(fork: Fork, labels: bool) -> bool:
    if labels:
        return not fork.present.right and any(candidate.right for candidate in fork.candidates)
    return any(candidate.reward > fork.present.reward for candidate in fork.candidates[1:])


def _is_best(fork: Fork, candidate: Candidate, labels: bool) -> bool:
    if labels:
        return bool(candidate.right)
    return candidate.reward == max(other.reward for other in fork.candidates)


def _value(candidate: Candidate, labels: bool) -> float:
    return float(bool(candidate.right)) if labels else candidate.reward


def _concordances(forks: Sequence[Fork], *, labels: bool) -> dict[str, dict[str, float] | None]:
    """How well rewards of rollouts and of prefixes order the candidates of a fork.

    ``reward``: of rollouts, against right and wrong; None without labels. ``prefix_reward``: against the same, without
    labels against the rewards of rollouts. ``log_prob``: likewise, for comparison.
    """

    def of(first: Callable[[Candidate], float], second: Callable[[Candidate], float]) -> dict[str, float] | None:
        return _over(forks, lambda fork: _concordance(fork.candidates, first, second))

    def target(candidate: Candidate) -> float:
        return _value(candidate, labels)

    return {
        "reward": of(lambda c: c.reward, target) if labels else None,
        "prefix_reward": of(_prefix_reward, target),
        "prefix_reward_of_reward": of(_prefix_reward, lambda c: c.reward),
        "log_prob": of(lambda c: c.log_prob, target),
    }


def _prefix_reward(candidate: Candidate) -> float:
    assert candidate.prefix_reward is not None, "the probe asked no proposal"
    return candidate.prefix_reward


def _concordance(
    candidates: Iterable[Candidate], first: Callable[[Candidate], float], second: Callable[[Candidate], float]
) -> float | None:
    pairs = [(a, b) for a, b in combinations(candidates, 2) if second(a) != second(b)]
    if not pairs:
        return None
    agree = sum(
        0.5 if first(a) == first(b) else float((first(a) > first(b)) == (second(a) > second(b))) for a, b in pairs
    )
    return agree / len(pairs)


def _mistakes(probe: Probe, mendable: Sequence[Fork], *, labels: bool) -> dict[str, Any]:
    """Where answers can be mended."""
    wrong = {answer.problem for answer in probe.answers if labels and not answer.right}
    found = {fork.problem for fork in mendable}
    by_problem: dict[str, list[Fork]] = {}
    for fork in probe.forks:
        by_problem.setdefault(fork.problem, []).append(fork)
    several = [fork for fork in mendable if len(by_problem[fork.problem]) > 1]
    least = [min(by_problem[fork.problem], key=lambda other: other.confidence) is fork for fork in several]
    return {
        "wrong_answers": len(wrong) if labels else None,
        "of_them_mendable": len(wrong & found) if labels else None,
        "at_the_least_confident_fork": _mean([float(own) for own in least]),
        "confidence": _mean([fork.confidence for fork in mendable]),
        "share_of_the_answer_before": _mean([fork.position / fork.length for fork in mendable]),
    }


def _over(forks: Sequence[Fork], figure: Callable[[Fork], float | None]) -> dict[str, float] | None:
    """The mean over problems of the mean over their forks, and its interval; None where no fork has the figure."""
    found: dict[str, list[float]] = {}
    for fork in forks:
        value = figure(fork)
        if value is not None:
            found.setdefault(fork.problem, []).append(value)
    return _interval([sum(own) / len(own) for own in found.values()])


def _interval(values: Sequence[float]) -> dict[str, float] | None:
    return asdict(interval(values)) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
