"""Runs every method, n and seed on every problem of a task; can be killed at any moment and goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from nabla_fast import profiling
from nabla_fast.config import NablaConfig
from nabla_fast.evaluation.batch import Models
from nabla_fast.evaluation.budget import Budget
from nabla_fast.evaluation.journal import Journal, Record
from nabla_fast.evaluation.methods import MAX_ROLLOUTS, METHODS, ONE_N, PROPOSALS, SEARCHES
from nabla_fast.evaluation.plots import FILES as PLOTS
from nabla_fast.evaluation.records import Key, key, latest, require_records
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.evaluation.worker import Arm, Piece, Plan, Worker
from nabla_fast.search_config import SearchConfig
from nabla_fast.stats import PHASES
from nabla_fast.whole_files import part_of, require_own_files, write_json

CONFIG = "config.json"
RESULTS = "results.jsonl"
SUMMARY = "summary.json"
# What `nabla-fast eval --demo` and `--bundled` wrote.
_OLD_PAIRS = {"demo": "smollm2", "bundled": "arithmetic"}
# More samples of one problem than this are a slip of the finger.
MOST_SAMPLES = 100_000
# What is traced: a trace of a whole evaluation would have gigabytes.
PROFILED_PROBLEMS, PROFILED_TOKENS = 2, 64


def make_plan(
    methods: Sequence[str],
    n: Sequence[int] | None,
    seeds: Sequence[int],
    config: NablaConfig,
    *,
    batch_size: int = 8,
    max_rollouts: int | None = None,
    budget: Budget | None = None,
    search: SearchConfig | None = None,
) -> Plan:
    """A plan of every method at every n, or of every method with a budget.

    Args:
        n: None with a budget, and only then.
        max_rollouts: run the methods of `MAX_ROLLOUTS` at this n alone; None runs them at every n. With a budget, the
            most rollouts that they draw; None sets no limit.
        budget: what each problem may cost.
        search: settings of the searches over steps; None takes the defaults.

    Raises:
        ValueError: for an unknown method, one that the settings do not allow, an empty list, a number below 1, or an n
            beside a budget; the message names the option.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"--methods is {', '.join(unknown) or 'empty'}; use some of {', '.join(METHODS)}")
    if budget is not None and n is not None:
        raise ValueError(
            f"--n is {', '.join(map(str, n))}, but --budget is {budget}, which says how many there are; leave out one"
        )
    numbers = list(dict.fromkeys(n or ()))
    if budget is None:
        told = ", ".join(map(str, numbers)) or "empty"
        if not numbers or min(numbers) < 1:
            raise ValueError(f"--n is {told}; give whole numbers of at least 1, such as 2,4,8")
        if max(numbers) > MOST_SAMPLES:
            raise ValueError(f"--n is {told}; give at most {MOST_SAMPLES}")
    if not seeds:
        raise ValueError("--seeds is empty; give whole numbers, such as 0,1,2")
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; give at least 1")
    arms: list[Arm] = []
    for method in dict.fromkeys(methods):
        if PROPOSALS.get(method) is not None:
            config.replace(proposal=PROPOSALS[method])  # raises here what would fail every problem
        own = numbers
        if method in ONE_N:
            own = [1]
        elif budget is not None:
            own = [0]
        elif method in MAX_ROLLOUTS and max_rollouts is not None:
            own = [max_rollouts]
        arms += [Arm(method, value) for value in own]
    config = config.replace(max_batch_size=batch_size)
    if budget is not None:
        config = config.replace(max_rollouts=MOST_SAMPLES if max_rollouts is None else max_rollouts)
    return Plan(tuple(arms), tuple(dict.fromkeys(seeds)), config, batch_size, budget, search or SearchConfig())


def describe(plan: Plan, task: Task, source: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the results depend on, as plain data: what two runs must share to share a directory.

    Args:
        source: where the models come from and how they are run.
    """
    settings = plan.config.to_dict()
    # The seed and the rollouts are the arms' own; how many are decoded together, drafts and how a server is asked
    # change no answer.
    for name in (
        "seed",
        "max_rollouts",
        "max_batch_size",
        "draft_tokens",
        "rollout_backend",
        "vllm_model",
        "vllm_timeout",
        "vllm_gpu_memory_utilization",
    ):
        del settings[name]
    if settings.pop("vllm_url") is not None or plan.config.rollout_backend == "vllm":
        settings["rollouts"] = "vllm"  # wherever it runs
    told = {
        "task": task.description,
        "arms": {arm.label: asdict(arm) for arm in plan.arms},
        "seeds": plan.seeds,
        "batch_size": plan.batch_size,
        "models": dict(source),
        "settings": settings,
    }
    # Only where they count, so that runs of earlier versions can be continued.
    if plan.budget is not None:
        told["budget"] = {**asdict(plan.budget), "max_rollouts": plan.config.max_rollouts}
    if any(arm.method in SEARCHES for arm in plan.arms):
        told["search"] = asdict(plan.search)
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def open_run(out: Path, description: Mapping[str, Any], keys: Collection[Key]) -> Journal:
    """The journal of the run that ``description`` is of, begun or continued in the directory ``out``.

    Args:
        keys: all that there is to do, `Plan.keys`.

    Raises:
        ValueError: if ``out`` holds another run, results without a configuration, results that are not this run's, or
            a link where a file of this run is to be; nothing is overwritten.
        NotADirectoryError: if ``out`` is a file, or within one.
        OSError: if it cannot be made or written to.
        BlockingIOError: if another process is writing to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"--out is {out}, {'' if out.is_file() else 'within '}a file; give a directory"
        ) from None
    except OSError as error:
        raise OSError(f"--out is {out}, which cannot be made ({error.strerror}); give another directory") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out is {out}, where nothing can be written; give another directory")
    file = out / CONFIG
    whole = [out / name for name in (CONFIG, SUMMARY, *PLOTS)]
    require_own_files([*whole, *map(part_of, whole), out / RESULTS])
    if file.exists():
        before = read_json(file)
        differences = _differences(before, description) and _differences(_with_todays_names(before), description)
        if differences:
            raise ValueError(
                f"--out is {out}, which holds a run with other settings ({'; '.join(differences)}); give another "
                "directory, or the settings of that run to continue it"
            )
    else:
        found = [name for name in (RESULTS, SUMMARY) if (out / name).exists()]
        if found:
            raise ValueError(f"--out is {out}, which holds {found[0]} but no {CONFIG}; give another directory")
        write_json(file, description)
    return Journal(out / RESULTS, lambda records: require_records(out / RESULTS, records, keys))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file.name} in {file.parent}, so it holds no run of nabla-fast eval")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not the {file.name} of a run")
    return value


def evaluate(
    models: Models,
    task: Task,
    plan: Plan,
    journal: Journal,
    *,
    retry_failed: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Does what is left to do in this process, one line of the journal for each finished (method, n, seed, problem).

    A problem that fails is recorded with its error, and the run goes on. Batches never hold the same prompt twice, so a
    problem's answer and counters do not depend on what else is left to do.

    Args:
        retry_failed: try problems again that failed in an earlier run.
        on_record: hears of every new record, when it is on the disk.

    Returns:
        The latest record of every piece of work.
    """
    worker = Worker(models, task, plan)

    def tell(record: Record) -> None:
        journal.append(record)
        if on_record is not None:
            on_record(record)

    for piece in left_to_do(plan, task, journal, retry_failed=retry_failed):
        worker.run(piece, tell)
    return latest(journal.records)


def trace(models: Models, task: Task, plan: Plan, directory: Path) -> None:
    """Writes a profile of the first problems by every method at its smallest n, their answers cut short.

    They are decoded for it alone: what the profiler takes is in no result.
    """
    smallest = {arm.method: arm for arm in sorted(plan.arms, key=lambda arm: -arm.n)}
    config = plan.config.replace(max_new_tokens=min(PROFILED_TOKENS, plan.config.max_new_tokens))
    few = replace(plan, arms=tuple(smallest.values()), config=config)
    worker = Worker(models, task, few)
    with profiling.tracing(directory):
        for piece in pieces(few, plan.seeds[0], task.problems[:PROFILED_PROBLEMS], ()):
            with record_function(piece.arm.label):
                worker.run(piece, lambda _: None)


def phase_tables(records: Sequence[Record]) -> str:
    """Seconds per phase of every method at every n, as text; answers that failed before they were graded have none."""
    arms: dict[Arm, dict[str, float]] = {}
    for record in records:
        seconds = arms.setdefault(Arm(record["method"], record["n"]), dict.fromkeys(PHASES, 0.0))
        for phase, own in record.get("phases", {}).items():
            seconds[phase] += own
    return "\n".join(f"{arm.label}\n{profiling.phase_table(seconds)}" for arm, seconds in arms.items())


def left_to_do(plan: Plan, task: Task, journal: Journal, *, retry_failed: bool = False) -> Iterator[Piece]:
    """The pieces of a run that its journal has no result of; with ``retry_failed``, none but a failed one."""
    done = {key(r) for r in latest(journal.records) if not (retry_failed and r["error"] is not None)}
    for seed in plan.seeds:
        yield from pieces(plan, seed, task.problems, done)


def pieces(plan: Plan, seed: int, problems: Sequence[Problem], done: Collection[Key]) -> Iterator[Piece]:
    """What is left to do for ``seed``: a few problems by every arm, then the next few."""
    for first in range(0, len(problems), plan.batch_size):
        chunk = problems[first : first + plan.batch_size]
        for arm in plan.runs(seed):
            most = max(1, plan.batch_size // plan.sequences(arm))
            left = [problem for problem in chunk if (arm.method, arm.n, seed, problem.id) not in done]
            for batch in _with_distinct_prompts(left, most):
                yield Piece(arm, seed, tuple(batch))


def _with_distinct_prompts(problems: Sequence[Problem], most: int) -> Iterator[list[Problem]]:
    batch: list[Problem] = []
    for problem in problems:
        if len(batch) == most or any(problem.chat == other.chat for other in batch):
            yield batch
            batch = []
        batch.append(problem)
    if batch:
        yield batch


def _with_todays_names(description: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run, the pairs of models named as they are now."""
    models = description.get("models")
    if isinstance(models, dict):
        description["models"] = {name: _OLD_PAIRS.get(str(value), value) for name, value in models.items()}
    return description


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Leaves of two plain values that are not the same, by name."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for part in dict.fromkeys([*old, *new]):
            inner = f"{name}.{part}" if name else part
            if part not in old:
                found.append(f"{inner} is new")
            elif part not in new:
                found.append(f"{inner} is left out")
            else:
                found += _differences(old[part], new[part], inner)
        return found
    return [] if old == new else [f"{name} was {json.dumps(old)}, is {json.dumps(new)}"]
