"""`nabla-fast train-reward`: a reward model for one's own policy and task, taught to judge and to point."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TimeRemainingColumn

from nabla_fast.cli.console import ERR, OUT, counted, counting_bars, status
from nabla_fast.cli.models import ModelChoice, chosen_models
from nabla_fast.cli.options import AnswerColumn, PromptColumn, configured, with_shared_options
from nabla_fast.whole_files import write_json

if TYPE_CHECKING:
    from nabla_fast.config import NablaConfig
    from nabla_fast.evaluation.tasks import Task
    from nabla_fast.reward_training.losses import Loss

_task = partial(typer.Option, rich_help_panel="Task")
_training = partial(typer.Option, rich_help_panel="Training")


@partial(with_shared_options, without=("max_batch_size", "proposal", "gradient_cache"))
def command(
    out: Annotated[Path, typer.Option(help="Directory of examples, state and adapter; a stopped run goes on in it.")],
    task: Annotated[str | None, _task(help="As of nabla-fast eval; its verifier labels.", metavar="TASK")] = None,
    task_option: Annotated[list[str] | None, _task(help="As of nabla-fast eval.", metavar="NAME=VALUE")] = None,
    problems: Annotated[int, _task(help="Problems to train on.")] = 400,
    validation: Annotated[int, _task(help="Problems after them that the result is probed on.")] = 100,
    split: Annotated[str | None, _task(help="Split of a hub data set or of arithmetic.")] = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    base: Annotated[
        str | None,
        _training(
            help="What the adapter goes on: a language model or classifier. Default: the policy.", metavar="PATH"
        ),
    ] = None,
    steps: Annotated[int, _training(help="Steps of the optimizer.")] = 400,
    rows: Annotated[int, _training(help="Problems a step.")] = 8,
    train_rate: Annotated[float, _training(help="Peak learning rate.")] = 5e-4,
    rank: Annotated[int, _training(help="Of the LoRA adapter.")] = 16,
    prefix: Annotated[float, _training(help="Weight of the loss of prefixes.")] = 0.5,
    point: Annotated[float, _training(help="Weight of the loss of the gradient; 0 trains a judge.")] = 0.5,
    forks: Annotated[int, _training(help="Most uncertain positions of an answer that are tried out.")] = 3,
    batch_size: Annotated[int, _training(help="Most answers and rollouts drawn together.")] = 16,
    **settings: Any,
) -> None:
    """Trains a LoRA adapter on the policy's own answers, labelled by the task's verifier, and probes it.

    It is taught to judge whole answers and prefixes, and that its gradient points at the better token at the positions
    where the policy was uncertain. --reward-model, if given, is probed on the same problems for comparison.
    """
    choice = chosen_models(settings)
    if not (choice.model or choice.pair):
        raise ValueError("--model is missing; give the policy whose answers are to be judged, or use --pair")
    name = task or (None if choice.demo is None else choice.demo.task)
    if name is None:
        raise ValueError("--task is missing; give the task whose verifier labels the answers")
    for option, value in (("--problems", problems), ("--validation", validation)):
        if value < 1:
            raise ValueError(f"{option} is {value}; give at least 1")
    from nabla_fast.reward_training.training import Recipe

    recipe = Recipe(
        steps=steps,
        batch_size=rows,
        learning_rate=train_rate,
        rank=rank,
        prefix=prefix,
        point=point,
        seed=settings["seed"] or 0,
    )
    columns = {"prompt_column": prompt_column, "answer_column": answer_column, "split": split}
    with status("preparing the problems"):
        whole = choice.load_task(name, task_option or [], max_problems=problems + validation, **columns)
    if len(whole.problems) <= problems:
        raise ValueError(
            f"--problems is {problems}, but {name} has {len(whole.problems)}, and --validation is {validation}; give "
            "fewer"
        )
    trained, held_out = _split(whole, problems)
    _run(choice, configured(choice.config, settings), trained, held_out, out, base, recipe, forks, batch_size)


def _split(whole: Task, problems: int) -> tuple[Task, Task]:
    """The first problems, to train on, and of the others those that ask something else, to probe the result on."""
    trained, others = whole.problems[:problems], whole.problems[problems:]
    asked = [problem.chat for problem in trained]
    held_out = [problem for problem in others if problem.chat not in asked]
    if not held_out:
        raise ValueError(
            f"--problems is {problems}, and all {len(others)} after them ask what is trained on; give fewer, or a task "
            "with more questions"
        )
    if repeated := len(others) - len(held_out):
        ERR.print(f"left out of the probe, since the same is asked in training: {counted(repeated, 'problem')}")
    return replace(whole, problems=trained), replace(whole, problems=held_out)


def _figures(
    models: tuple[Any, Any, Any, Any], held_out: Task, config: NablaConfig, more: Mapping[str, Any]
) -> dict[str, Any]:
    from nabla_fast.evaluation import methods, probe_report
    from nabla_fast.evaluation.probe import probe

    return probe_report.figures(probe(methods.load(*models, config), held_out, config, **more), labels=True)


def _kept(file: Path, asked: Mapping[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``find()``, or what it gave in an earlier call that asked the same."""
    from nabla_fast.evaluation.runner import read_json

    plain = json.loads(json.dumps(asked))
    known = read_json(file) if file.exists() else {}
    if known.get("asked") != plain:
        known = {"asked": plain, "figures": find()}
        write_json(file, known)
    figures: dict[str, Any] = known["figures"]
    return figures


def _run(
    choice: ModelChoice,
    config: NablaConfig,
    trained: Task,
    held_out: Task,
    out: Path,
    base: str | None,
    recipe: Any,
    forks: int,
    batch_size: int,
) -> None:
    from nabla_fast.models.loading import load_reward_model
    from nabla_fast.reward_training import card, examples, training

    out.mkdir(parents=True, exist_ok=True)
    with status("loading the policy"):
        whole = choice.pair or choice.reward_model
        model, tokenizer, *reward = choice.load() if whole else choice.load_language_model()
    base = base or str(model.config.name_or_path)
    with counting_bars(TimeRemainingColumn()) as bars:
        bar = bars.add_task("examples", total=len(trained.problems))
        advance = partial(bars.advance, bar)
        found = examples.collect(
            model, tokenizer, trained, config, out, forks=forks, batch_size=batch_size, on_problems=advance
        )
        steps = bars.add_task("steps", total=recipe.steps)

        def stepped(step: int, loss: Loss) -> None:
            bars.update(steps, completed=step, description=f"steps, loss {loss.judge.item():.2f}")

        adapter = training.train(base, tokenizer, found, out, recipe, device=model.device, on_step=stepped)
        figures: dict[str, dict[str, Any]] = {}
        rewards = {"before": (reward[0], reward[1])} if reward else {}
        source = choice.describe()
        how = {"dtype": str(source["dtype"]), "attn_implementation": choice.attn_implementation}
        rewards["trained"] = load_reward_model(adapter, device=model.device, **how)
        asked = {
            "policy": str(model.config.name_or_path),
            "task": held_out.description,
            "problems": [problem.id for problem in held_out.problems],
            "settings": config.to_dict(),
            "forks": forks,
        }
        of = {"before": source, "trained": {"base": base, "examples": len(found), **how, **asdict(recipe)}}
        for label, own in rewards.items():
            advance = partial(bars.advance, bars.add_task(f"probe, {label}", total=len(held_out.problems)))
            more = {"forks": forks, "batch_size": batch_size, "on_problems": advance}
            look = partial(_figures, (model, tokenizer, *own), held_out, config, more)
            figures[label] = _kept(out / f"probe-{label}.json", {**asked, "reward_model": of[label]}, look)
    after = figures["trained"]
    told = {"base": base, "task": trained.description, "examples": len(found), "recipe": asdict(recipe)}
    card.write_card(adapter, told, figures.get("before"), after)
    from nabla_fast.cli.probe import show

    show({**after, "task": held_out.description})
    OUT.print(f"the adapter and its card are in {adapter}; use it as --reward-model", soft_wrap=True)
