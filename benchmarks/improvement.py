"""What a change made faster: benchmark cases with the package as it was before and after it, on one machine, in turn.

    python benchmarks/improvement.py --before REV --after REV --suite operators --case TEXT --what TEXT --reason TEXT

Either commit is checked out into a temporary git worktree and built there; --before-tree and --after-tree name
worktrees that are built already. Both packages run the benchmarks of this checkout, by `run.py`, a process for each
turn. Seconds are medians over the turns. The baselines of the cases do not change, so the ratio of their times says
what else the machine did.

With --what the figures go to results/improvements.json, from which `plots.py` makes a table; without, they are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import commit, write
from run import RESULTS, SUITES, positive
from tables import best_of_ours, clean, factor

HERE = Path(__file__).parent
Run = dict[str, Any]
SIDES = ("before", "after")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in SIDES:
        parser.add_argument(f"--{side}", metavar="REV", required=True, help=f"the commit {side} the change")
        parser.add_argument(f"--{side}-tree", metavar="DIR", type=Path, help="a built worktree of it, not to build one")
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--case", metavar="TEXT", required=True, help="cases with TEXT in their names")
    parser.add_argument("--what", default="", metavar="TEXT", help="what was changed, a sentence")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why it was slow and is no longer, a sentence")
    parser.add_argument("--turns", type=positive, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: as many as torch takes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="small sizes; the table leaves these figures out")
    parser.add_argument("--output", type=Path, default=RESULTS / "improvements.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if bool(options.what) != bool(options.reason):
        parser.error("--what and --reason go together")
    return options


def git(*arguments: str, where: Path = HERE) -> str:
    """What git says; ValueError with its own words if it fails."""
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


@contextlib.contextmanager
def built(revision: str, tree: Path | None, scratch: Path) -> Iterator[Path]:
    """A worktree of ``revision`` with its native library: ``tree`` if given, else a new one below ``scratch``."""
    meant = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if tree is not None:
        found = git("rev-parse", "HEAD", where=tree)
        if found != meant:
            raise ValueError(f"{tree} has {found[:7]} checked out, not {revision}, which is {meant[:7]}")
        yield tree.resolve()
        return
    made = scratch / meant[:12]
    git("worktree", "add", "--detach", str(made), meant)
    try:
        print(f"building {revision} …", flush=True)
        environment = {**os.environ, "NABLA_FAST_REQUIRE_NATIVE": "1"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"building {revision} failed: {' '.join(done.stderr.splitlines()[-3:])}")
        yield made
    finally:
        git("worktree", "remove", "--force", str(made))


def run_once(tree: Path, options: argparse.Namespace, output: Path) -> Run:
    """One run of the cases with the package in ``tree``."""
    command = [sys.executable, str(HERE / "run.py"), "--suite", options.suite, "--only", options.case]
    command += ["--device", options.device, "--output", str(output), *(["--quick"] if options.quick else [])]
    command += ["--threads", str(options.threads)] if options.threads else []
    # Ahead of whatever nabla_fast is installed.
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if not output.exists():
        raise ValueError(f"run.py measured nothing with {tree}: {' '.join((done.stdout + done.stderr).split())[-500:]}")
    run: Run = json.loads(output.read_text())
    if run["commit"] != commit(tree):
        raise ValueError(f"run.py measured the package at {run['commit']}, not the one in {tree}")
    for record in run["records"]:
        if "error" in record:
            raise ValueError(f"{record['case']} does not run with the package at {run['commit']}: {record['error']}")
    return run


def entries(runs: dict[str, list[Run]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each case, from the runs of either side."""
    cases = {side: [{r["case"]: r for r in run["records"]} for run in runs[side]] for side in SIDES}
    last = runs["after"][-1]
    common = {
        "what": options.what,
        "reason": options.reason,
        "suite": options.suite,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": last["machine"],
        "versions": last["versions"],
        "threads": last["threads"],
        "quick": options.quick,
        "benchmarks": commit(HERE),
        "command": command_of(options),
    }
    made = []
    for case in cases["after"][0]:
        taken = {side: [records[case] for records in cases[side]] for side in SIDES}
        ours = {side: [best_of_ours(r)[1]["median_ms"] / 1e3 for r in some] for side, some in taken.items()}
        theirs = {side: statistics.median(baseline_ms(record) for record in some) for side, some in taken.items()}
        seconds = {side: statistics.median(some) for side, some in ours.items()}
        told = {
            side: {"commit": runs[side][0]["commit"], "seconds": seconds[side], "turns": ours[side]} for side in SIDES
        }
        ratios = {
            "ratio": seconds["before"] / seconds["after"],
            # What rollouts are compared with is the package itself, in other settings.
            "baseline_ratio": None if options.suite == "rollouts" else theirs["before"] / theirs["after"],
            "clean": all(clean(record) for some in taken.values() for record in some),
        }
        made.append({"case": case, **common, **told, **ratios})
    return made


def baseline_ms(record: dict[str, Any]) -> float:
    """Time of the fastest contender that is not ours."""
    return min(contender["median_ms"] for contender in record["contenders"].values() if not contender["ours"])


def command_of(options: argparse.Namespace) -> str:
    """What measures the same again, wherever it is run."""
    words = ["python", "benchmarks/improvement.py", "--suite", options.suite, "--case", options.case]
    for side in SIDES:
        words += [f"--{side}", git("rev-parse", "--short", getattr(options, side))]
    words += ["--threads", str(options.threads)] if options.threads else []
    return shlex.join([*words, *(["--quick"] if options.quick else [])])


def store(new: Sequence[dict[str, Any]], output: Path) -> None:
    """Adds records to a file, in place of older ones of the same change, case and processor."""

    def same(one: dict[str, Any]) -> tuple[str, ...]:
        return one["before"]["commit"], one["after"]["commit"], one["case"], one["machine"]["processor"]

    old = json.loads(output.read_text()) if output.exists() else []
    replaced = {same(one) for one in new}
    write(output, [*(one for one in old if same(one) not in replaced), *new])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Builds, runs in turn, and returns what came out."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        trees = {
            side: stack.enter_context(built(getattr(options, side), getattr(options, f"{side}_tree"), scratch / side))
            for side in SIDES
        }
        for turn in range(options.turns):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                print(f"turn {turn + 1} of {options.turns}, {side} …", flush=True)
                runs[side].append(run_once(trees[side], options, scratch / f"{side}-{turn}.json"))
    return entries(runs, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        found = measure(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in found:
        before, after = (one[side]["seconds"] * 1e3 for side in SIDES)
        print(f"{one['case']}: {before:.3g} ms, now {after:.3g} ms: {one['ratio']:.3g} times as fast", end="")
        print(f" (its baseline: {factor(one['baseline_ratio'])} times)" + ("" if one["clean"] else ", disturbed"))
    if options.what:
        store(found, options.output)
        print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
