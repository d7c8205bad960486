"""The model card of a trained reward model: what it was trained on, and what a probe says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_fast.evaluation.bootstrap import with_interval
from nabla_fast.whole_files import write_json

CARD, FIGURES = "README.md", "probes.json"


def write_card(
    adapter: Path, settings: Mapping[str, Any], before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> None:
    """Writes the card and its figures into the adapter's folder.

    Args:
        settings: of the training, plain data.
        before: `nabla_fast.evaluation.probe_report.figures` of another reward model on the same problems; None where
            there was none to compare with.
        after: those of the trained one.
    """
    write_json(adapter / FIGURES, {"before": before, "after": after})
    columns = [("trained", after)] if before is None else [("before", before), ("trained", after)]
    rows = [
        "| figure | " + " | ".join(name for name, _ in columns) + " |",
        "| --- |" + " --- |" * len(columns),
        _row("right answers told from wrong ones (concordance)", columns, lambda told: told["concordance"]["reward"]),
        _row("right prefixes told from wrong ones", columns, lambda told: told["concordance"]["prefix_reward"]),
    ]
    for name in after["proposals"]:
        label = f"precision at 1 of {name}"
        rows.append(_row(label, columns, lambda told, own=name: told["proposals"][own]["precision_at_1"]))
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {json.dumps(settings['base'])}",
        "pipeline_tag: text-classification",
        "---",
        "",
        "# A reward model that judges and points",
        "",
        "A LoRA adapter and score head, trained by `nabla-fast train-reward` on the policy's own answers: to score",
        "whole answers and prefixes as right or wrong, and to have a gradient that points at the better token.",
        "",
        f"On {after['answers']} problems that it was not trained on, {after['mendable_forks']} forks of "
        f"{after['forks']} mendable; means with 95 % bootstrap intervals over problems. `likeliest` asks no reward, "
        "and is what the others are to be compared with.",
        "",
        *rows,
        "",
        after["recommendation"]["why"],
        "",
        "## Training",
        "",
        "```json",
        json.dumps(dict(settings), indent=2),
        "```",
        "",
    ]
    (adapter / CARD).write_text("\n".join(lines), encoding="utf-8")


def _row(label: str, columns: list[tuple[str, Mapping[str, Any]]], figure: Any) -> str:
    return f"| {label} | " + " | ".join(with_interval(figure(told), 1, ".2f") for _, told in columns) + " |"
