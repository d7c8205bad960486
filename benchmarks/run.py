"""Runs the benchmarks and writes what they measured; `nabla-fast bench` and `make bench` call it.

    python benchmarks/run.py                         # everything, to benchmarks/results/<machine>/<date>.json
    python benchmarks/run.py --suite operators --only dto_step --output FILE

The file is written anew after each case, so that a run that is cut leaves what it has measured; given that file again,
it goes on with the cases that are missing. A case that fails is recorded with its error; the others go on, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from cases import Case, Record, Setting
from machine import commit, gpu, machine, slug, versions, write
from measure import steady_allocator
from rich.console import Console
from tables import FORMAT, summary

from nabla_fast.models.kept import clear_graphs
from nabla_fast.whole_files import part_of, require_own_files

RESULTS = Path(__file__).parent / "results"
# What two parts of one run have in common.
_SAME = ("format", "commit", "quick", "device", "machine", "versions", "threads")
_MOST = 1024
SUITES = {
    "operators": (
        "relaxed_stats",
        "linear_relaxed_stats",
        "straight_through_embedding",
        "soft_embedding",
        "linear_log_likelihood",
        "gradient_norm",
        "dto_step",
        "token_diff",
        "draw_token",
        "sampling",
        "linear",
        "attention",
    ),
    "gradients": ("gradients",),
    "dto": ("dto",),
    "generate": ("generate",),
    "rollouts": ("rollouts", "vllm"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be given again; default: all")
    parser.add_argument("--only", metavar="TEXT", help="cases with TEXT in their names")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats, no compilation")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: as many as torch takes")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/<machine>/<date>.json; the file of a run that was cut goes on with it",
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number of at least 1, which threads and turns are not more of than a machine can bear."""
    if not (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= _MOST):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1 and at most {_MOST}")
    return int(text)


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ValueError if it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but torch sees no GPU; use cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def default_output(device: torch.device, quick: bool, today: str | None = None) -> Path:
    """A file for today's results that does not exist yet; that of a quick run says so in its name."""
    today = today or datetime.now(timezone.utc).strftime("%Y-%m-%d")
    directory = RESULTS / slug(device)
    stem = f"{today}-quick" if quick else today
    tries = (directory / f"{stem}{'' if i == 1 else f'-{i}'}.json" for i in range(1, sys.maxsize))
    return next(path for path in tries if not path.exists())


def chosen_cases(setting: Setting, suites: Sequence[str], only: str | None) -> Iterator[Case]:
    """The cases of some suites; nothing is allocated before one is run."""
    for suite in suites:
        for name in SUITES[suite]:
            yield from (case for case in cases_of(name, setting) if only is None or only in case.name)


def cases_of(group: str, setting: Setting) -> list[Case]:
    """The cases of ``test_bench_<group>.py``."""
    cases: list[Case] = importlib.import_module(f"test_bench_{group}").cases(setting)
    return cases


def begin(setting: Setting, threads: int, output: Path) -> dict[str, Any]:
    """What is run, and on what; and what was measured before, if ``output`` is the file of the same run.

    Raises:
        ValueError: if it is another file, or cannot be written.
    """
    result = description(setting, threads)
    require_place(output)
    if output.exists():
        before = read(output)
        other = [name for name in _SAME if before.get(name) != json.loads(json.dumps(result[name]))]
        if other:
            raise ValueError(
                f"{output} is of another run: its {other[0]} is {before.get(other[0])!r}, here it is "
                f"{result[other[0]]!r}; give a file that does not exist, or none"
            )
        setting.known_ceilings.update((getattr(torch, name), found) for name, found in before["ceilings"].items())
        result["started"], result["load_average"] = before["started"], before["load_average"]
        result["records"] = [record for record in before["records"] if "error" not in record]
    result["ceilings"] = {str(t).removeprefix("torch."): setting.ceilings(t) for t in rated_dtypes(setting)}
    return result


def require_place(output: Path) -> None:
    """Raises ValueError or OSError where nothing can be written: not to be found out when a case is measured."""
    try:
        require_own_files([output, part_of(output)])
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except (ValueError, OSError) as error:
        raise ValueError(f"--output is {output}, where nothing can be written: {error}") from error


def read(file: Path) -> dict[str, Any]:
    """What a run has written; ValueError if it is something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no file of a run ({error}); give one that does not exist, or none") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no file of a run; give one that does not exist, or none")
    return found


def description(setting: Setting, threads: int) -> dict[str, Any]:
    """What is run, and on what; nothing is measured yet."""
    return {
        "format": FORMAT,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "quick": setting.quick,
        "device": str(setting.device),
        "machine": machine() | ({"gpu": gpu(setting.device)} if setting.device.type == "cuda" else {}),
        "versions": versions(),
        "threads": threads,
        "load_average": {"before": os.getloadavg(), "after": None},
        "ceilings": {},
        "records": [],
    }


def rated_dtypes(setting: Setting) -> list[torch.dtype]:
    """Those whose ceilings the records refer to; integers are rated by float32's."""
    return list(dict.fromkeys((torch.float32, *setting.dtypes)))


def run_case(case: Case) -> Record:
    """The record of a case; one with an ``error`` if it fails."""
    start = time.perf_counter()
    try:
        record = case.run()
    except Exception as error:  # whatever is wrong with one case, the others can be measured
        record = {"suite": None, "name": case.name, "error": f"{type(error).__name__}: {error}"}
    free_memory()
    for contender in record.get("contenders", {}).values():
        contender.pop("samples_ms", None)
    return {"case": case.name, **record, "wall_seconds": round(time.perf_counter() - start, 2)}


def free_memory() -> None:
    """Forgets what a case has left, compiled graphs too: torch keeps eight of a function and then runs it eagerly."""
    clear_graphs()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Names of cases and files may hold "[/b]".
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    try:
        device = choose_device(options.device)
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    steady_allocator()
    setting = Setting(device, options.quick)
    output = options.output or default_output(device, options.quick)
    cases = list(chosen_cases(setting, options.suite or list(SUITES), options.only))
    if not cases:
        console.print(f"error: --only is {options.only!r}, which no case has in its name", soft_wrap=True)
        return 2
    try:
        result = begin(setting, torch.get_num_threads(), output)
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    known = {record["case"] for record in result["records"]}
    for case in cases:
        if case.name in known:
            console.print(f"{case.name} … measured before")
            continue
        console.print(f"{case.name} …", end=" ")
        record = run_case(case)
        console.print(record.get("error") or f"{record['wall_seconds']:.0f} s", soft_wrap=True)
        result["records"].append(record)
        result["load_average"]["after"] = os.getloadavg()
        try:
            write(output, result)
        except (ValueError, OSError) as error:
            console.print(f"error: {output} cannot be written ({error}); what it holds is kept", soft_wrap=True)
            return 2
    console.print(*summary(result), f"written to {output}", sep="\n")
    return int(any("error" in record for record in result["records"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
