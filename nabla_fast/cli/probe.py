"""`nabla-fast probe`: which proposal suits a reward model, found out in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nabla_fast.cli.console import ERR, OUT, counting_bars, plain, print_json, print_table, status
from nabla_fast.cli.models import chosen_models
from nabla_fast.cli.options import AnswerColumn, AsJson, PromptColumn, Split, TaskName, configured, with_shared_options

_task = partial(typer.Option, rich_help_panel="Task")
_run = partial(typer.Option, rich_help_panel="Run")

_LABELS_HELP = "Have the task's verifier say what is right; without it, the highest reward of a rollout is the target."


@partial(with_shared_options, without=("max_batch_size", "proposal", "gradient_cache"))
def command(
    task: TaskName = None,
    task_option: Annotated[
        list[str] | None, _task(help="A parameter of a reasoning-gym task, such as min_digits=2.", metavar="NAME=VALUE")
    ] = None,
    max_problems: Annotated[int, _task(help="Take this many problems.")] = 100,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    forks: Annotated[int, _run(help="Most uncertain positions of an answer that are looked at.")] = 3,
    labels: Annotated[bool, _run("--labels/--no-labels", help=_LABELS_HELP)] = True,
    batch_size: Annotated[int, _run(help="Most answers and rollouts drawn together.")] = 16,
    out: Annotated[Path | None, _run(help="Directory for probe.json and probe.png.", metavar="DIR")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Tries every candidate out at the uncertain positions of some answers, and says which proposal suits the reward.

    A fork is a position where the model is uncertain, by --entropy-threshold and --confidence-threshold. At each, every
    proposal chooses a token, every candidate is rolled out, and the rollouts tell which choices were good.
    """
    choice = chosen_models(settings)
    choice.require()
    name = task or (None if choice.demo is None else choice.demo.task)
    if name is None:
        raise ValueError("--task is missing; give the task whose problems are to be looked at")
    from nabla_fast.evaluation import methods, probe_report
    from nabla_fast.evaluation.probe import probe

    if out is not None:
        probe_report.prepare(out)
    columns = {"prompt_column": prompt_column, "answer_column": answer_column, "split": split}
    with status("preparing the problems"):
        problems = choice.load_task(name, task_option or [], max_problems=max_problems, **columns)
    config = configured(choice.config, settings)
    with status("loading the models"):
        models = methods.load(*choice.load(), config)
    with counting_bars() as bars:
        advance = partial(bars.advance, bars.add_task("problems", total=len(problems.problems)))
        found = probe(models, problems, config, forks=forks, labels=labels, batch_size=batch_size, on_problems=advance)
    told = {
        "task": problems.description,
        "models": choice.describe(),
        "settings": config.to_dict(),
        **probe_report.figures(found, labels=labels),
    }
    if out is not None:
        probe_report.write(out, found, told)
    (print_json if as_json else show)(told)
    if out is not None:
        (ERR if as_json else OUT).print(f"every fork, the figures and a plot are in {out}", soft_wrap=True)


def show(told: Mapping[str, Any]) -> None:
    """Prints the figures of a probe and its recommendation."""
    from nabla_fast.evaluation.bootstrap import with_interval

    labelled = told["labels"] == "verifier"
    unit = 100 if labelled else 1
    rows = [
        (
            name,
            with_interval(own["precision_at_1"], 100, ".0f"),
            with_interval(own["gain"], unit, "+.1f" if labelled else "+.3f"),
            with_interval(own["gain_over_control"], unit, "+.1f" if labelled else "+.3f"),
            f"{own['proposed']:.0%}",
            "-" if own["model_calls"] is None else f"{own['model_calls']:.0f}",
        )
        for name, own in told["proposals"].items()
    ]
    gain = "gain,\npoints" if labelled else "gain,\nreward"
    columns = ("proposal", "precision\nat 1, %", gain, "minus\nlikeliest", "other\ntoken", "model\ncalls")
    where = f"{told['forks']} forks of {told['answers']} answers, {told['mendable_forks']} of them mendable"
    print_table(f"{told['task']['name']}: {where}; 95 % intervals over problems", columns, rows)
    figures = {
        "reward": "reward of a rollout, against right and wrong",
        "prefix_reward": f"reward of a prefix, against {'right and wrong' if labelled else 'the rollout’s'}",
        "prefix_reward_of_reward": "reward of a prefix, against the rollout's reward",
        "log_prob": f"log-likelihood, against {'right and wrong' if labelled else 'the rollout’s'}",
    }
    pairs = [(text, with_interval(told["concordance"][name], 1, ".2f")) for name, text in figures.items()]
    print_table("concordance within a fork; 0.5 is chance", ("figure", "concordance"), pairs)
    mistakes = told["mistakes"]
    if labelled:
        told_wrong = (
            f"{mistakes['of_them_mendable']} of {mistakes['wrong_answers']} wrong answers can be mended at them"
        )
        OUT.print(plain(told_wrong), soft_wrap=True)
    OUT.print(plain(f"\n{told['recommendation']['why']}"), soft_wrap=True)
