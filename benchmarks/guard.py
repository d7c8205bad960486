"""Ratios of ours over eager that must not fall: `tests/benchmarks/test_benchmark_guard.py` compares with guard.json.

    python benchmarks/guard.py             # measure and compare
    python benchmarks/guard.py --record    # measure ten times and write guard.json; on a quiet machine

Everything runs on one thread and is compared by the processor time of its fastest repeat, so that a busy machine
changes little; what is still under its floor is measured again, and counts as slower only if it stays there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import test_bench_dto_step
import test_bench_gradient_norm
import test_bench_linear_log_likelihood
import test_bench_linear_relaxed_stats
import test_bench_relaxed_stats
import test_bench_straight_through_embedding
import torch
from cases import Contest, Setting, check, meaning_of
from machine import commit, machine, versions, write
from measure import Budget, in_turn, steady_allocator
from shapes import Shape

GUARD = Path(__file__).parent / "guard.json"
REPEATS, ATTEMPTS = 10, 6
_HIGHEST = 0.6  # of the median: other processors with the same vector instructions have other ratios
# SmolLM2's vocabulary, and latents narrow enough that a test need not wait for them.
SMALL = Shape("small", 49152, 128, True, reward_width=128)
Ratio = Callable[[], float]


def guarded() -> dict[str, Contest]:
    """The operators that are guarded, small."""
    setting = Setting(torch.device("cpu"), quick=True)
    one_logits_row = test_bench_dto_step.VARIANTS[1]
    return {
        "relaxed_stats float32": test_bench_relaxed_stats.contest(setting, SMALL, 16, torch.float32),
        "relaxed_stats bfloat16": test_bench_relaxed_stats.contest(setting, SMALL, 16, torch.bfloat16),
        "linear_relaxed_stats float32": test_bench_linear_relaxed_stats.contest(setting, SMALL, 16, torch.float32),
        "straight_through_embedding float32": test_bench_straight_through_embedding.contest(
            setting, SMALL, 16, torch.float32, False
        ),
        "linear_log_likelihood float32": test_bench_linear_log_likelihood.contest(setting, SMALL, 16, torch.float32),
        "gradient_norm float32": test_bench_gradient_norm.contest(setting, SMALL, 16, torch.float32),
        "dto_step logits row float32": test_bench_dto_step.contest(setting, SMALL, 1, torch.float32, one_logits_row),
    }


def ratio_of(contest: Contest, ours: str = "native") -> Ratio:
    """Checks a contest's native back end and its eager baseline once; the function measures how many times faster."""
    inputs = contest.inputs(0)
    meant = meaning_of(contest, inputs)
    for name in (ours, "eager"):
        check(contest, name, inputs, meant)
    functions = {"ours": (contest.ours | contest.baselines)[ours], "eager": contest.baselines["eager"]}
    calls = {name: [functools.partial(f, *inputs.rows, *inputs.shared)] for name, f in functions.items()}

    def measure() -> float:
        times = in_turn(calls, torch.device("cpu"), Budget(0.2, 10, 40), time.thread_time)
        return times["eager"]["fastest_ms"] / times["ours"]["fastest_ms"]

    return measure


def floor_of(ratios: Sequence[float]) -> float:
    """As far below the lowest repeat as that is below their median, and no higher than 0.6 of the median.

    Repeats above the median say nothing: there, something held up eager.

    Raises:
        ValueError: if the repeats differ too much for a floor.
    """
    lowest, median = min(ratios), statistics.median(ratios)
    floor = min(2 * lowest - median, _HIGHEST * median)
    if floor <= 0:
        raise ValueError(f"repeats from {lowest:.2f}, median {median:.2f}, give no floor; measure on a quiet machine")
    return floor


def slower(ratios: Mapping[str, Ratio], floors: Mapping[str, float]) -> list[str]:
    """One sentence for each operator that stays under its floor in `ATTEMPTS` measurements."""
    found = []
    for name, measure in ratios.items():
        best = 0.0
        for _ in range(ATTEMPTS):
            best = max(best, measure())
            if best >= floors[name]:
                break
        else:
            found.append(
                f"{name} is {best:.2f} times as fast as eager, and was recorded to be at least {floors[name]:.2f}"
            )
    return found


def recorded() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(GUARD.read_text())
    return result


def why_not_here() -> str | None:
    """Why the recorded floors say nothing about this machine; None if they do."""
    meant, here = recorded()["machine"]["capability"], torch.backends.cpu.get_cpu_capability()
    return None if meant == here else f"the floors were recorded with {meant}, and this processor has {here}"


def record() -> dict[str, Any]:
    """Floors from `REPEATS` measurements, and under what circumstances they were made."""
    before = os.getloadavg()
    ratios = {name: ratio_of(contest) for name, contest in guarded().items()}
    taken: dict[str, list[float]] = {name: [] for name in ratios}
    for _ in range(REPEATS):  # the repeats of one operator are spread over the run
        for name, measure in ratios.items():
            taken[name].append(measure())
    return {
        "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "load_average": {"before": before, "after": os.getloadavg()},
        "operators": {name: {"floor": floor_of(some), "ratios": some} for name, some in taken.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write guard.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steady_allocator()
    if options.record:
        write(GUARD, record())
    elif (reason := why_not_here()) is not None:
        print(reason)
        return 0
    floors = {name: entry["floor"] for name, entry in recorded()["operators"].items()}
    ratios = {name: ratio_of(contest) for name, contest in guarded().items()}
    for name, measure in ratios.items():
        print(f"{name}: {measure():.2f} times as fast as eager, floor {floors[name]:.2f}")
    found = slower(ratios, floors)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
