"""Which proposal is worth its price, with which reward? The bundled task, rewards that judge alike and point unlike.

    python tools/train_ordinary_rewards.py --work REWARDS
    python benchmarks/quality_proposals.py tune --work DIR --rewards REWARDS       settings, on the tuning split
    python benchmarks/quality_proposals.py measure --work DIR --rewards REWARDS    500 held-out problems, three seeds
    python benchmarks/quality_proposals.py timing --work DIR --rewards REWARDS     seconds, on a machine that rests
    python benchmarks/quality_proposals.py probes --work DIR --rewards REWARDS     what nabla-fast probe says of each
    python benchmarks/quality_proposals.py smollm2 --work DIR --trained DIR2       SmolLM2, its reward and a trained one
    python benchmarks/quality_proposals.py report --work DIR --output benchmarks/results/quality
    python benchmarks/plots.py                                                    the tables of docs/quality.md

Every stage can be stopped and started again: DIR keeps every answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import machine, write
from quality import SEEDS, WHERE, _accuracy, run
from quality_methods import BLIND
from quality_report import merged

from nabla_fast import demo
from nabla_fast.config import PROPOSALS
from nabla_fast.demo import arithmetic, example
from nabla_fast.evaluation import methods, probe_report, report
from nabla_fast.evaluation.probe import probe
from nabla_fast.evaluation.runner import read_json
from nabla_fast.evaluation.tasks import ARITHMETIC, GYM_PREFIX, load_task
from nabla_fast.models.loading import load_reward_model
from nabla_fast.reward_training.examples import EXAMPLES
from nabla_fast.whole_files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from train_ordinary_rewards import load

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Work = Annotated[Path, typer.Option(help="Directory that keeps the answers.")]
Rewards = Annotated[Path, typer.Option(help="Directory that train_ordinary_rewards.py wrote.")]
Names = Annotated[str, typer.Option(help="Reward models, separated by commas; taught is the bundled one.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Problems = Annotated[int, typer.Option(help="Problems.")]

NAMES = "taught,judge-long-0,judge-0,gated-0,steps-0"
ROLLOUTS = 8
SAMPLES = (1, 2, 4, 8, 16)
START = {"confidence_threshold": 0.7, "gradient_threshold": None, "candidates": 5}
# What is tuned for each reward and proposal, one setting after the other.
SWEEP: dict[str, dict[str, tuple[Any, ...]]] = {
    "dto": {"learning_rate": (0.3, 1.0, 3.0), "reward_coeff": (1.0, 10.0), "confidence_threshold": (0.7, 0.9)},
    "first_order": {"reward_coeff": (1.0, 10.0, 100.0), "confidence_threshold": (0.7, 0.9)},
    "prefix_reward": {"confidence_threshold": (0.7, 0.9)},
    "likeliest": {"confidence_threshold": (0.7, 0.9)},
    "guided": {"confidence_threshold": (0.7, 0.9)},
}
CONTROL = "likeliest"
# What `quality.py smollm2` chose on problems of its own.
SMOLLM2 = {"learning_rate": 0.01}
# Tasks of `nabla_fast.demo.example` with more questions, so that those of training need not be asked again.
HARDER = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
}


@app.command()
def tune(work: Work, rewards: Rewards, names: Names = NAMES, threads: Threads = 2, problems: Problems = 200) -> None:
    """Sweeps settings of every proposal on the tuning split, and keeps the best."""
    torch.set_num_threads(threads)
    task = load_task(ARITHMETIC, split="tuning", max_problems=problems)
    for name in names.split(","):
        models = _models(rewards, name)
        for proposal, sweep in SWEEP.items():
            best = START | {"proposal": proposal}
            for setting, values in sweep.items():
                found = {}
                for value in values:
                    config = arithmetic.CONFIG.replace(**best | {setting: value})
                    folder = work / "tune" / name / f"{proposal}-{setting}-{value}"
                    found[value] = _accuracy(run(folder, models, task, [("nabla", ROLLOUTS)], config, seeds=(0,)))
                best[setting] = max(found, key=lambda value: found[value])
            (work / "tuned" / name).mkdir(parents=True, exist_ok=True)
            write_json(work / "tuned" / name / f"{proposal}.json", best)


@app.command()
def measure(
    work: Work,
    rewards: Rewards,
    names: Names = NAMES,
    threads: Threads = 2,
    problems: Problems = 500,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(map(str, SEEDS)),
    proposals: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PROPOSALS),
) -> None:
    """Proposals and Best-of-N with every reward on held-out problems."""
    torch.set_num_threads(threads)
    task = load_task(ARITHMETIC, max_problems=problems)
    for name in names.split(","):
        how = {"seeds": tuple(map(int, seeds.split(",")))}
        _measure(work / "measure" / name, work, rewards, name, task, how, proposals.split(","))


@app.command()
def timing(work: Work, rewards: Rewards, names: Names = NAMES, threads: Threads = 2, problems: Problems = 128) -> None:
    """Seconds of the same, nothing shared; on a machine that does nothing else."""
    torch.set_num_threads(threads)
    task = load_task(ARITHMETIC, max_problems=problems)
    for name in names.split(","):
        _measure(work / "timing" / name, work, rewards, name, task, {"seeds": (0,), "anew": True})


@app.command()
def smollm2(
    work: Work,
    trained: Annotated[Path | None, typer.Option(help="Directory that nabla-fast train-reward wrote.")] = None,
    task: Annotated[str, typer.Option(help="One of " + ", ".join(HARDER) + ".")] = "products",
    threads: Threads = 2,
    problems: Problems = 100,
) -> None:
    """SmolLM2 with its ordinary reward model, and with one that ``nabla-fast train-reward --pair smollm2`` trained.

    Questions that the latter was trained on are left out.
    """
    torch.set_num_threads(threads)
    asked = _asked(trained) if trained else []
    whole = load_task(GYM_PREFIX + task, {**HARDER[task], "seed": 9_000_000}, max_problems=4 * problems)
    held_out = replace(whole, problems=[p for p in whole.problems if list(p.chat) not in asked][:problems])
    rewards = {"ordinary": partial(demo.load_smollm2_reward, **WHERE)}
    if trained:
        rewards["trained"] = partial(load_reward_model, trained / "adapter", **WHERE)
    for kind, load_own in rewards.items():
        models = methods.load(*demo.load_smollm2(**WHERE), *load_own(), example.CONFIG)
        folder, how = work / "measure" / f"smollm2-{task}-{kind}", {"seeds": (0,), "batch_size": 32, "anew": True}
        samples = [("greedy", 1), *(("best-of-n", n) for n in SAMPLES if n <= ROLLOUTS)]
        run(folder / "baselines", models, held_out, samples, example.CONFIG, **how)
        for proposal in sorted(PROPOSALS, key="dto".__eq__):  # what takes longest comes last
            config = example.CONFIG.replace(**START, **SMOLLM2, proposal=proposal)
            run(folder / proposal, models, held_out, [("nabla", ROLLOUTS)], config, **how)


@app.command()
def probes(work: Work, rewards: Rewards, names: Names = NAMES, threads: Threads = 2, problems: Problems = 100) -> None:
    """What a probe of the tuning split says of each reward model, with a verifier's labels and without."""
    torch.set_num_threads(threads)
    task = load_task(ARITHMETIC, split="tuning", max_problems=problems)
    (work / "probes").mkdir(parents=True, exist_ok=True)
    for name in names.split(","):
        file = work / "probes" / f"{name}.json"
        if not file.exists():
            models = _models(rewards, name)
            found = probe(models, task, arithmetic.CONFIG.replace(**START), forks=2, batch_size=32)
            told = {
                kind: probe_report.figures(found, labels=labels)
                for kind, labels in (("with_labels", True), ("without", False))
            }
            write_json(file, {"task": task.description, **told})
            print(name, *(own["recommendation"]["why"] for own in told.values()), sep="\n  ", flush=True)


@app.command("report")
def write_report(
    work: Work,
    output: Annotated[Path, typer.Option(help="Directory of the JSON files.")],
    names: Names = NAMES,
    prefix: Annotated[str, typer.Option(help="Of their names; another one for a run beside others.")] = "proposals",
) -> None:
    """Writes a JSON file for each reward, and one with the tuning if there was one."""
    tuned: dict[str, Any] = {}
    for name in names.split(","):
        for kind, stem in (("measure", prefix), ("timing", f"{prefix}-timing")):
            folders = {folder.name: folder for folder in sorted((work / kind / name).glob("*"))}
            if folders:
                told = {"reward": name, **_versions(), **merged(folders), "against_control": _against(folders)}
                write(output / f"{stem}-{name}.json", told)
        tuned[name] = {
            "settings": {proposal: _settings(work, name, proposal) for proposal in PROPOSALS},
            "accuracy": {
                folder.name: _accuracy(report.summarise(*report.read_run(folder)))
                for folder in sorted((work / "tune" / name).glob("*"))
            },
        }
    probed = {file.stem: {**read_json(file), **_versions()} for file in sorted((work / "probes").glob("*.json"))}
    if probed:
        # Beside those of rewards that were probed elsewhere.
        file = output / f"{prefix}-probes.json"
        others = read_json(file)["rewards"] if file.exists() else {}
        write(file, {"rewards": {**others, **probed}})
    if any(own["accuracy"] for own in tuned.values()):
        write(output / f"{prefix}-tuning.json", {**_versions(), "rewards": tuned})


def _measure(
    folder: Path,
    work: Path,
    rewards: Path,
    name: str,
    task: Any,
    how: dict[str, Any],
    proposals: Sequence[str] = PROPOSALS,
) -> None:
    models = _models(rewards, name)
    samples = [("greedy", 1), *(("best-of-n", n) for n in SAMPLES)]
    run(folder / "baselines", models, task, samples, arithmetic.CONFIG, **how)
    for proposal in proposals:
        config = arithmetic.CONFIG.replace(**_settings(work, name, proposal))
        run(folder / proposal, models, task, [("nabla", ROLLOUTS)], config, **how)
        if proposal == "dto" and not how.get("anew"):  # the evaluation itself has no such method
            run(folder / "blind", models, task, [(BLIND, ROLLOUTS)], config, **how)


def _asked(trained: Path) -> list[Any]:
    """The chats that a reward model was trained on."""
    return [json.loads(line)["chat"] for line in (trained / EXAMPLES).read_text().splitlines()]


def _settings(work: Path, name: str, proposal: str) -> dict[str, Any]:
    """What was tuned, or where tuning starts: the settings that were tuned for the bundled reward model."""
    tuned = work / "tuned" / name / f"{proposal}.json"
    return read_json(tuned) if tuned.exists() else START | {"proposal": proposal}


def _models(rewards: Path, name: str) -> methods.Models:
    return methods.load(*arithmetic.load_policy(**WHERE), *load(rewards, name), arithmetic.CONFIG)


def _against(folders: dict[str, Path]) -> dict[str, Any]:
    """Proposal → accuracy and costs minus those of the control, problem by problem."""
    (control,) = report.read_run(folders[CONTROL])[1].values()
    found = {}
    for name, folder in folders.items():
        if name not in ("baselines", CONTROL):
            (own,) = report.read_run(folder)[1].values()
            found[name] = report.paired(control, own)
    return found


def _versions() -> dict[str, Any]:
    import transformers

    return {"machine": machine(), "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


if __name__ == "__main__":
    app()
