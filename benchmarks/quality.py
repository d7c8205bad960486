"""Does ∇-Reasoner beat Best-of-N for the same compute? Measured with the bundled pair, and with SmolLM2.

    python benchmarks/quality.py tune --work DIR        settings, one after the other, on the tuning split
    python benchmarks/quality.py measure --work DIR     every method on 500 held-out problems, three seeds; with
                                                        --runs, some of them, so that several processes can share them
    python benchmarks/quality.py smollm2 --work DIR     products and gcd, 100 problems
    python benchmarks/quality.py judge --work DIR --reward-model DIR    Best-of-N by a judge without a useful gradient
    python benchmarks/quality.py timing --work DIR      seconds, on a machine that does nothing else meanwhile
    python benchmarks/quality.py report --work DIR --output benchmarks/results/quality --page docs/quality_arms.md
    python benchmarks/plots.py                         the tables of README.md and docs/quality.md, from those files

Every stage can be stopped and started again: DIR keeps every answer.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_methods import BLIND, FRESH, SAMPLES, thrifty
from quality_report import write_reports

from nabla_fast import demo
from nabla_fast.config import ANCHORS, PARAMETERIZATIONS, NablaConfig
from nabla_fast.demo import arithmetic, example
from nabla_fast.evaluation import methods, report
from nabla_fast.evaluation.methods import Models
from nabla_fast.evaluation.runner import Arm, Plan, describe, evaluate, open_run, read_json
from nabla_fast.evaluation.tasks import ARITHMETIC, GYM_PREFIX, Task, load_task
from nabla_fast.models.loading import load_reward_model
from nabla_fast.whole_files import write_json

PLAIN = dict(methods.METHODS)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Work = Annotated[Path, typer.Option(help="Directory that keeps the answers.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Problems = Annotated[int, typer.Option(help="Problems of each task.")]

SEEDS = (0, 1, 2)
# "auto" would differ from one processor to another.
WHERE = {"dtype": "float32"}
ROLLOUTS = (2, 4, 8, 16)
BATCH_SIZE = 128
SMOLLM2_ROLLOUTS = (2, 4, 8)
SMOLLM2_RATES = (0.01, 0.1)
SMOLLM2_BATCH_SIZE = 32
BASELINES = "baselines"
TUNED = "tuned"

# What is tuned on its own, and what all of it starts from. Without a gradient threshold at first: the one of the
# published models would leave nothing to optimize.
KINDS = {f"{p}-{a}": {"parameterization": p, "anchor": a} for p in PARAMETERIZATIONS for a in reversed(ANCHORS)}
START = {"gradient_threshold": None, "confidence_threshold": 0.97, "reward_coeff": 1.0}
# What the tuning changes, one setting after the other, keeping the best: name → values.
SWEEP: dict[str, tuple[Any, ...]] = {
    "learning_rate": (0.03, 0.1, 0.3, 1.0, 3.0),
    "confidence_threshold": (0.7, 0.88, 0.92),
    "reward_coeff": (0.1, 1.0, 10.0),
    "gradient_threshold": (None, 0.1, 0.3),
}
# The reward's gradient off; its judgement of proposals stays.
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "-postfix": {"update_postfix": True}, "-control": {"reward_coeff": 0.0}}
MAIN = "latents-rollout"


def run(
    folder: Path,
    models: Models,
    task: Task,
    arms: Sequence[tuple[str, int]],
    config: NablaConfig,
    *,
    seeds: Sequence[int] = SEEDS,
    batch_size: int = BATCH_SIZE,
    anew: bool = False,
) -> dict[str, Any]:
    """Runs arms, or what is left of them, and returns the summary; ``anew`` decodes even what is known already."""
    start = time.perf_counter()
    methods.METHODS.update(PLAIN if anew else thrifty())
    plan = Plan(tuple(Arm(*arm) for arm in arms), tuple(seeds), config, batch_size)
    source = {"model": "demo", "threads": torch.get_num_threads()}
    with open_run(folder, describe(plan, task, source), plan.keys(task.problems)) as journal:
        records = evaluate(models, task, plan, journal)
    failed = [record["error"] for record in records if record["error"] is not None]
    if failed:
        raise SystemExit(f"{folder}: {len(failed)} answers failed, the first with {failed[0]}")
    summary = report.summarise(*report.read_run(folder))
    told = {label: f"{arm['accuracy']['mean']:.1%}" for label, arm in summary["arms"].items()}
    print(f"{folder.name}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    return summary


@app.command()
def tune(
    work: Work,
    threads: Threads = 2,
    problems: Problems = 200,
    rollouts: int = 8,
    kinds: Annotated[str, typer.Option(help="Some of them, separated by commas.")] = ",".join(KINDS),
) -> None:
    """Sweeps settings on the tuning split, and keeps the best of each kind in DIR/tuned."""
    torch.set_num_threads(threads)
    models = bundled()
    task = load_task(ARITHMETIC, split="tuning", max_problems=problems)
    (work / TUNED).mkdir(parents=True, exist_ok=True)
    for kind in _chosen("--kinds", kinds, KINDS):
        best = START | KINDS[kind]
        for name, values in SWEEP.items():
            found = {}
            for value in values:
                config = arithmetic.CONFIG.replace(**best | {name: value})
                folder = work / "tune" / f"{kind}-{name}-{value}"
                found[value] = _accuracy(run(folder, models, task, [("nabla", rollouts)], config, seeds=(0,)))
            best[name] = max(found, key=lambda value: found[value])
        write_json(work / TUNED / f"{kind}.json", best)
        print(best)


@app.command()
def measure(
    work: Work,
    threads: Threads = 2,
    problems: Problems = 500,
    runs: Annotated[str, typer.Option(help="Some of them, separated by commas. Default: all.")] = "",
) -> None:
    """Baselines, every variant, control arms and blind resampling on held-out problems, with the tuned settings."""
    torch.set_num_threads(threads)
    models = bundled()
    task = load_task(ARITHMETIC, max_problems=problems)
    planned = plans({file.stem: read_json(file) for file in sorted((work / TUNED).glob("*.json"))})
    for name in _chosen("--runs", runs or ",".join(planned), planned):
        arms, config = planned[name]
        run(work / "measure" / name, models, task, arms, config)


@app.command()
def timing(work: Work, threads: Threads = 2, problems: Problems = 128) -> None:
    """Seconds of Best-of-N and of the main variant, nothing shared; on a machine that rests."""
    torch.set_num_threads(threads)
    models = bundled()
    task = load_task(ARITHMETIC, max_problems=problems)
    _, config = plans({MAIN: read_json(work / TUNED / f"{MAIN}.json")})[MAIN]
    once = {"seeds": (0,), "anew": True}
    run(
        work / "timing" / BASELINES, models, task, [("greedy", 1), *(("best-of-n", n) for n in SAMPLES)], config, **once
    )
    run(work / "timing" / MAIN, models, task, [("nabla", n) for n in ROLLOUTS], config, **once)


@app.command()
def judge(
    work: Work,
    reward_model: Annotated[Path, typer.Option(help="Such as train_demo_pair.py makes with --compass 0.")],
    threads: Threads = 2,
    problems: Problems = 500,
) -> None:
    """The same with a reward model that was trained to judge alone: its Best-of-N, and its gradient on and off."""
    torch.set_num_threads(threads)
    models = methods.load(
        *arithmetic.load_policy(**WHERE), *load_reward_model(reward_model, **WHERE), arithmetic.CONFIG
    )
    task = load_task(ARITHMETIC, max_problems=problems)
    planned = plans({MAIN: read_json(work / TUNED / f"{MAIN}.json")})
    run(work / "measure" / "judge", models, task, [("best-of-n", n) for n in SAMPLES], arithmetic.CONFIG)
    for name in (MAIN, f"{MAIN}-control"):
        run(work / "measure" / f"judge-{name}", models, task, *planned[name])


def plans(tuned: dict[str, Any]) -> dict[str, tuple[list[tuple[str, int]], NablaConfig]]:
    """Every run on the held-out problems: name → its arms and settings.

    Args:
        tuned: kind → its settings, `MAIN` among them.
    """
    if MAIN not in tuned:
        raise typer.BadParameter(f"--work has no {TUNED}/{MAIN}.json; run the stage tune first")
    settings = {kind: arithmetic.CONFIG.replace(**tuned[kind]) for kind in KINDS if kind in tuned}

    def arms(method: str) -> list[tuple[str, int]]:
        return [(method, n) for n in ROLLOUTS]

    planned = {BASELINES: (baselines(SAMPLES), settings[MAIN])}
    for kind, config in settings.items():
        for name, changes in VARIANTS.items():
            planned[kind + name] = arms("nabla"), config.replace(**changes)
    planned["blind"] = arms(BLIND), settings[MAIN]
    planned["fresh"] = arms(FRESH), settings[MAIN]
    return planned


def _chosen(option: str, names: str, known: Collection[str]) -> list[str]:
    unknown = set(names.split(",")) - set(known)
    if unknown:
        raise typer.BadParameter(f"{option} names {', '.join(sorted(unknown))}; use some of {', '.join(known)}")
    return names.split(",")


@app.command()
def smollm2(
    work: Work,
    threads: Threads = 2,
    problems: Problems = 100,
    tasks: Annotated[str, typer.Option(help="Names, separated by commas.")] = "products,gcd",
) -> None:
    """SmolLM2 and its reward model on tasks of reasoning-gym; the learning rate is chosen on other problems."""
    torch.set_num_threads(threads)
    models = methods.load(*demo.load_smollm2(**WHERE), *demo.load_smollm2_reward(**WHERE), example.CONFIG)
    most = [("nabla", SMOLLM2_ROLLOUTS[-1])]
    for name in tasks.split(","):
        folder, once = work / "smollm2" / name, {"seeds": (0,), "batch_size": SMOLLM2_BATCH_SIZE}
        tuning, task = (
            load_task(GYM_PREFIX + name, {**example.TASKS[name], "seed": seed}, max_problems=count)
            for seed, count in ((8_000_000, SMOLLM2_BATCH_SIZE), (9_000_000, problems))
        )
        tuned = {}
        for anchor in reversed(ANCHORS):
            found = {}
            for rate in SMOLLM2_RATES:
                config = example.CONFIG.replace(anchor=anchor, learning_rate=rate)
                tried = work / "smollm2-tune" / f"{name}-{anchor}-{rate}"
                found[rate] = _accuracy(run(tried, models, tuning, most, config, **once))
            best = max(found, key=lambda rate: found[rate])
            tuned[anchor] = example.CONFIG.replace(anchor=anchor, learning_rate=best)
        run(folder / BASELINES, models, task, baselines((1, *SMOLLM2_ROLLOUTS)), example.CONFIG, **once)
        arms = [("nabla", n) for n in SMOLLM2_ROLLOUTS]
        run(folder / MAIN, models, task, arms, tuned["rollout"], **once)
        control = tuned["rollout"].replace(**VARIANTS["-control"], gradient_threshold=None)
        run(folder / f"{MAIN}-control", models, task, most, control, **once)
        run(folder / "latents-argmax", models, task, arms, tuned["argmax"], **once)


@app.command("report")
def write_report(
    work: Work,
    output: Annotated[Path, typer.Option(help="Directory of the JSON files.")],
    page: Annotated[Path, typer.Option(help="File to write the tables of every arm into; plots go beside it.")],
) -> None:
    """Writes summaries, tables and plots of all that was measured."""
    write_reports(work, output, page)


def _accuracy(summary: dict[str, Any]) -> float:
    """Of the only arm of a run."""
    (arm,) = summary["arms"].values()
    return float(arm["accuracy"]["mean"])


def bundled() -> Models:
    """The bundled pair, ready."""
    return methods.load(*arithmetic.load_policy(**WHERE), *arithmetic.load_reward(**WHERE), arithmetic.CONFIG)


def baselines(samples: Sequence[int]) -> list[tuple[str, int]]:
    """Greedy decoding once, self-consistency and Best-of-N at every N."""
    voted = [("self-consistency", n) for n in samples if n > 1]
    return [("greedy", 1), *voted, *(("best-of-n", n) for n in samples)]


if __name__ == "__main__":
    app()
