"""Which back end was measured to be the fastest, by GPU and case: what `nabla_fast.ops.backends` asks for "auto".

measured.json is made from benchmarks/results by benchmarks/fastest.py. A case is an operator, or a variant of it with
shapes of its own, such as "dto_step, one latents row". What was measured of kernels that have changed since decides
nothing: each entry has the numbers of the kernels that were timed, and counts only where they are those of `KERNELS`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

KERNELS: dict[str, dict[str, int]] = {
    "dto_step": {"cuda": 2, "triton": 2},
    "token_diff": {"cuda": 1, "triton": 1},
}
"""Of operators with more than one back end for a GPU, the number of each one's kernels.

Whoever changes kernels so that they may be faster or slower raises the number; benchmarks write it into their results.
Results without one are from before there were any, and of number 1.
"""

_TABLE = Path(__file__).with_name("measured.json")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """GPU's name → case → ``fastest``, ``milliseconds`` (by model), ``kernels`` (by back end) and ``commit``."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(_TABLE.read_text())
    return found


def why_not_used(case: str, entry: dict[str, Any]) -> str | None:
    """Why an entry decides nothing, in one clause; None if it does."""
    now = KERNELS[case.partition(",")[0]]
    changed = [name for name, number in entry["kernels"].items() if now.get(name) != number]
    return f"{' and '.join(changed)} changed since" if changed else None


def fastest(case: str, device: torch.device | str) -> str | None:
    """The back end that was the fastest in this case on such a GPU; None where nobody measured it as it is now."""
    if case.partition(",")[0] not in KERNELS:
        return None
    entry = table().get(_name(torch.device(device)), {}).get(case)
    return None if entry is None or why_not_used(case, entry) else str(entry["fastest"])


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def report() -> list[dict[str, Any]]:
    """Every entry as plain data: ``gpu``, ``case``, ``fastest``, ``commit``, and ``reason``, why it is not used."""
    return [
        {"gpu": gpu, "case": case, **{k: entry[k] for k in ("fastest", "commit")}, "reason": why_not_used(case, entry)}
        for gpu, cases in table().items()
        for case, entry in cases.items()
    ]
