"""What the page's template fills in: an output and those beside it, as plain data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from nabla_fast.config import NablaConfig
from nabla_fast.html.chart import first_reward, reward_path
from nabla_fast.html.tokens import revision_rows, shown_tokens, statuses
from nabla_fast.html.words import count, counted, excerpt, number, seconds, visible
from nabla_fast.record import NABLA, Details
from nabla_fast.stats import STEPS, SequenceStats

if TYPE_CHECKING:
    from nabla_fast.generate import NablaOutput


def method_of(output: NablaOutput) -> str:
    """What found an output's answers."""
    return output.details[0].method if output.details else NABLA


def view(output: NablaOutput, others: Mapping[str, NablaOutput]) -> dict[str, Any]:
    """Everything that the template shows."""
    everyone = {method_of(output): output, **others}
    answers = [_answer(output, others, i) for i in range(len(output.texts))]
    totals = output.stats.totals
    several = len(answers) > 1
    return {
        "method": method_of(output),
        "answers": answers,
        "several": several,
        "summary": [
            counted(len(answers), "answer"),
            counted(totals.rollouts, "rollout"),
            counted(totals.model_calls, "model call"),
            seconds(sum(totals.seconds.values())),
        ],
        "all": _cost({name: one.stats.totals for name, one in everyone.items()}) if several else None,
        "cache": [(name.replace("_", " "), count(value)) for name, value in output.stats.cache.items()],
        "graphs": [(name.replace("_", " "), count(value)) for name, value in output.stats.graphs.items()],
        "settings": _settings(output.details[0].config) if output.details else [],
    }


def _answer(output: NablaOutput, others: Mapping[str, NablaOutput], i: int) -> dict[str, Any]:
    """The answer to one prompt, and those beside it."""
    everyone = {method_of(output): output, **others}
    stats, reward = output.stats.sequences[i], output.rewards[i]
    details = output.details[i] if output.details else None
    first = first_reward(stats.revisions, reward)
    samples = {name: one.details[i].samples for name, one in everyone.items() if one.details}
    # What was chosen from samples is the highest of their line.
    levels = {name: other.rewards[i] for name, other in others.items() if not samples.get(name)}
    drawn = next(((name, own) for name, own in samples.items() if own), ("", []))
    chat = [] if details is None else details.chat
    accepted = sum(r.accepted for r in stats.revisions)
    tokens = [] if details is None else shown_tokens(stats, details)
    piece = {position: token["start"] for token in tokens for position in token["positions"]}
    rows = [] if details is None else revision_rows(stats, details)
    shown = [{**row, "piece": piece[int(row["position"])]} for row in rows]
    return {
        "id": f"a{i + 1}",
        "number": i + 1,
        "chat": [{"role": visible(m["role"]), "text": visible(m["content"])} for m in chat],
        "excerpt": excerpt(chat[-1]["content"] if chat else output.texts[i]) or "(empty)",
        "text": visible(output.texts[i]),
        "tokens": tokens,
        "cards": [token["card"] for token in tokens],
        "happened": Counter(statuses(stats, len(output.sequences[i]))),
        "record": details is not None and details.record is not None,
        "cut_off": stats.finish_reason == "length",
        "first": number(first),
        "reward": number(reward),
        "accepted": accepted,
        "rejected": len(stats.revisions) - accepted,
        "facts": _facts(stats, len(output.sequences[i]), details),
        "revisions": shown,
        "path": reward_path(
            reward, stats.revisions, drawn, levels, chosen=details is not None and bool(details.samples)
        ),
        "beside": [_beside(name, other, i) for name, other in others.items()],
        "cost": _cost({name: one.stats.sequences[i] for name, one in everyone.items()}),
    }


def _beside(name: str, output: NablaOutput, i: int) -> dict[str, Any]:
    stats = output.stats.sequences[i]
    told = [counted(len(output.sequences[i]), "token"), counted(stats.model_calls, "model call")]
    told.append(seconds(sum(stats.seconds.values())))
    return {"name": name, "text": visible(output.texts[i]), "reward": number(output.rewards[i]), "told": told}


def _facts(stats: SequenceStats, tokens: int, details: Details | None) -> list[tuple[str, str]]:
    most = f" of {details.config.most_rollouts}" if details is not None and details.method == NABLA else ""
    return [
        ("rollouts", f"{stats.rollouts}{most}"),
        ("tokens", count(tokens)),
        ("looked at", counted(stats.optimised_positions, "token")),
        ("gradients", count(stats.gradient_evaluations)),
        ("model calls", count(stats.model_calls)),
        ("time", seconds(sum(stats.seconds.values()))),
    ]


def _cost(records: Mapping[str, SequenceStats]) -> dict[str, Any]:
    """Seconds per phase, as bars on one scale, and counters."""
    spent = {name: record.seconds for name, record in records.items()}
    longest = max(sum(own.values()) for own in spent.values()) or 1.0
    bars = [
        {
            "name": name,
            "total": seconds(sum(own.values())),
            # The longest is as wide as a bar can be.
            "parts": [
                {"phase": phase, "name": step, "width": round(100 * took / longest, 3), "told": seconds(took)}
                for phase, step in STEPS.items()
                if (took := own[phase]) > 0
            ],
        }
        for name, own in spent.items()
    ]
    phases = [
        {"phase": phase, "name": name, "cells": [seconds(own[phase]) if own[phase] else "–" for own in spent.values()]}
        for phase, name in STEPS.items()
    ]
    told = [{**record.counters(), **record.passes()} for record in records.values()]
    counters = [(name.replace("_", " "), [count(one[name]) for one in told]) for name in told[0]]
    return {"names": list(records), "bars": bars, "phases": phases, "counters": counters}


def _settings(config: NablaConfig) -> list[dict[str, Any]]:
    """Every setting, and whether it is another one than the default."""
    usual = vars(NablaConfig())
    return [{"name": name, "value": _said(value), "own": value != usual[name]} for name, value in vars(config).items()]


def _said(value: Any) -> str:
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:g}"
    if hasattr(value, "temperature"):
        return ", ".join(f"{f.name} {_said(getattr(value, f.name))}" for f in fields(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(repr(part) if isinstance(part, str) else str(part) for part in value) or "none"
    return "none" if value is None else visible(str(value))
