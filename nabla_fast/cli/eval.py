"""`nabla-fast eval`: accuracy and cost of decoding methods on a task, and two such runs side by side."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from nabla_fast.cli.console import ERR, OUT, counted, plain, print_json, status
from nabla_fast.cli.eval_tables import show_comparison, show_summary
from nabla_fast.cli.models import ModelChoice, chosen_models
from nabla_fast.cli.options import AnswerColumn, AsJson, PromptColumn, Split, TaskName, configured, with_shared_options
from nabla_fast.config import NablaConfig
from nabla_fast.search_config import SearchConfig
from nabla_fast.stopping import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nabla_fast.evaluation.methods import Models
    from nabla_fast.evaluation.ray_engine import Cluster
    from nabla_fast.evaluation.runner import Plan
    from nabla_fast.evaluation.tasks import Task

_SHOWN_FAILURES = 5

_task = partial(typer.Option, rich_help_panel="Task")
_run = partial(typer.Option, rich_help_panel="Run")
_steps = partial(typer.Option, rich_help_panel="Searches over steps")
_engine = partial(typer.Option, rich_help_panel="Engine")

_OPTION_HELP = "A parameter of a reasoning-gym task, such as min_digits=2; give the option again for another one."
_N, _STEPS = "8", SearchConfig()
_METHODS = "greedy,self-consistency,best-of-n,nabla,likeliest"
_METHODS_HELP = (
    "Separated by commas: greedy, self-consistency, best-of-n; nabla with the proposal that is configured, or with "
    "another one, likeliest (the control, without gradients), first-order, prefix-reward or guided; beam-search and "
    "mcts (Monte-Carlo tree search)."
)
_N_HELP = (
    "Samples of self-consistency and best-of-n, max_rollouts of nabla and its other proposals, candidates a step of "
    "beam-search, simulations of mcts; several separated by commas. greedy and guided draw once. Default: 8."
)
_BUDGET_HELP = (
    "What every method may spend on a problem, instead of --n: calls=N (model calls), flops=X or seconds=S. It begins "
    "another sample, rollout, step or simulation while it has spent less. --max-rollouts still limits rollouts."
)
_SEPARATOR_HELP = (
    "A step of beam-search and mcts ends where this is complete; \\n is a line break. Empty: steps of --search-tokens."
)
_PROFILE_HELP = (
    "Directory for a trace of the first 2 problems, which every method decodes once more for it at its smallest n and "
    "with 64 tokens at most, and for the seconds per phase of the whole run."
)


@partial(with_shared_options, without=("seed", "max_batch_size"))
def command(
    context: typer.Context,
    task: TaskName = None,
    task_option: Annotated[list[str] | None, _task(help=_OPTION_HELP, metavar="NAME=VALUE")] = None,
    max_problems: Annotated[int | None, _task(help="Take this many problems. Default: all.")] = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    methods: Annotated[str, _run(help=_METHODS_HELP)] = _METHODS,
    n: Annotated[str | None, _run(help=_N_HELP, metavar="N,N,...")] = None,
    budget: Annotated[str | None, _run(help=_BUDGET_HELP, metavar="COST=AMOUNT")] = None,
    seeds: Annotated[str, _run(help="Separated by commas; greedy takes the first.", metavar="SEED,...")] = "0",
    out: Annotated[
        Path | None, _run(help="Directory of the results; a run that was stopped goes on in it.", metavar="DIR")
    ] = None,
    batch_size: Annotated[int, _run(help="Most sequences decoded together.")] = 8,
    retry_failed: Annotated[bool, _run("--retry-failed", help="Try problems again that failed before.")] = False,
    profile: Annotated[Path | None, _run(help=_PROFILE_HELP, metavar="DIR")] = None,
    search_separator: Annotated[str, _steps(help=_SEPARATOR_HELP)] = r"\n",
    search_tokens: Annotated[int, _steps(help="Longest step, in tokens.")] = _STEPS.search_tokens,
    search_width: Annotated[
        int, _steps(help="Continuations of each beam, and children of a node of the tree.")
    ] = _STEPS.search_width,
    exploration: Annotated[
        float, _steps(help="Exploration constant of mcts, for rewards scaled to [0, 1].")
    ] = _STEPS.exploration,
    engine: Annotated[str, _engine(help="local (this process) or ray (workers on a Ray cluster).")] = "local",
    ray_address: Annotated[
        str | None,
        _engine(
            help="A Ray cluster's address, or auto for the one of this machine. Default: start one here.",
            metavar="ADDRESS",
        ),
    ] = None,
    workers: Annotated[int | None, _engine(help="Ray workers. Default: as many as there is room for.")] = None,
    cpus_per_worker: Annotated[
        int | None, _engine(help="CPU cores of a Ray worker. Default: 4, or all there are.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Put two runs on the same problems side by side instead.", metavar="DIR DIR"),
    ] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measures accuracy and cost of ∇-Reasoner, and of the methods to compare it with, on a task."""
    if compare is not None:
        _refuse_others(context)
        from nabla_fast.evaluation import report

        (print_json if as_json else show_comparison)(report.compare(*compare))
        return
    choice = chosen_models(settings)
    if task is None and choice.demo is not None:
        task = choice.demo.task
    if task is None or out is None:
        raise ValueError(f"{'--task' if task is None else '--out'} is missing; give --task and --out, or --compare")
    choice.require()
    from nabla_fast import profiling
    from nabla_fast.evaluation import ray_engine, runner
    from nabla_fast.evaluation.budget import Budget

    search = SearchConfig(search_separator.replace(r"\n", "\n"), search_tokens, search_width, exploration)
    columns = {"prompt_column": prompt_column, "answer_column": answer_column, "split": split}
    problems = partial(choice.load_task, task, task_option or [], max_problems=max_problems, **columns)
    devices = choice.device, choice.reward_device
    cluster = ray_engine.choose_cluster(engine, ray_address, workers, cpus_per_worker, *devices)
    if profile is not None:
        if cluster is not None:
            raise ValueError(
                f"--profile is {profile}, but --engine is ray; a trace is of one process, so use --engine local"
            )
        profiling.prepare(profile)
    config = configured(choice.config, settings)
    key = os.environ.get("VLLM_API_KEY")
    if key and config.vllm_url and config.vllm_api_key is None:
        # Workers on other machines have an environment of their own.
        config = config.replace(vllm_api_key=key)
    most = None if budget is None else Budget.parse(budget)
    numbers = None if n is None and most is not None else _integers("--n", _N if n is None else n)
    plan = runner.make_plan(
        _names(methods),
        numbers,
        _integers("--seeds", seeds),
        config,
        batch_size=batch_size,
        max_rollouts=settings["max_rollouts"],
        budget=most,
        search=search,
    )
    failed = _evaluate(choice, problems, plan, out, cluster, profile, retry_failed=retry_failed, as_json=as_json)
    raise typer.Exit(1 if failed else 0)


def _evaluate(
    choice: ModelChoice,
    problems: Callable[[], Task],
    plan: Plan,
    out: Path,
    cluster: Cluster | None,
    profile: Path | None,
    *,
    retry_failed: bool,
    as_json: bool,
) -> int:
    """Runs a plan under progress bars, and shows what comes out; how many answers failed."""
    from nabla_fast import profiling
    from nabla_fast.cli.progress import RunProgress
    from nabla_fast.evaluation import ray_engine, report, runner
    from nabla_fast.rollout import ServerLostError

    source = choice.describe()
    with status("preparing the problems"):
        task = problems()
    keys = plan.keys(task.problems)
    # The directory first: a mistake there should not have to wait for the models.
    with runner.open_run(out, runner.describe(plan, task, source), keys) as journal:
        load = partial(_load, choice.for_workers(), plan.config)
        if cluster is not None:
            engine = partial(ray_engine.evaluate, load, task, plan, journal, cluster)
        else:
            with status("loading the models"):
                models = load()
            if profile is not None:
                with status("profiling the first problems"):
                    runner.trace(models, task, plan, profile)
            engine = partial(runner.evaluate, models, task, plan, journal)
        bars = RunProgress(plan, task.problems, journal.records, retry_failed=retry_failed)
        try:
            with bars.progress:
                records = engine(retry_failed=retry_failed, on_record=bars.on_record)
        except (KeyboardInterrupt, StoppedError, ServerLostError):
            done = len(runner.latest(journal.records))
            told = f"stopped with {done} of {counted(len(keys), 'answer')} in {out}"
            ERR.print(f"{told}; the same command goes on from there", soft_wrap=True)
            raise
    if profile is not None:
        profiling.write(profile / profiling.PHASE_TABLE, runner.phase_tables(records))
    summary = report.write_report(out)
    (print_json if as_json else show_summary)(summary)
    failed = [record for record in records if record["error"] is not None]
    for record in failed[:_SHOWN_FAILURES]:
        arm = f"{record['method']} {record['n'] or ''}".strip()
        where = f"{arm}, seed {record['seed']}, {record['problem']}"
        ERR.print(Text.assemble((f"failed: {where}: ", "red"), plain(record["error"])), soft_wrap=True)
    if failed:
        told = f"{len(failed)} of {counted(len(records), 'answer')} failed; {runner.RESULTS} has them all"
        ERR.print(told, soft_wrap=True)
    profiled = "" if profile is None else f"; the profile is in {profile}"
    (ERR if as_json else OUT).print(f"results, summary and plots are in {out}{profiled}", soft_wrap=True)
    return len(failed)


def _load(choice: ModelChoice, config: NablaConfig) -> Models:
    """Called where the models are to be: in this process, or in each worker."""
    from nabla_fast.evaluation import methods

    return methods.load(*choice.load(), config)


def _refuse_others(context: typer.Context) -> None:
    """Raises ValueError for an option that means nothing beside --compare, which would seem to have been heard."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT" and parameter.name not in ("compare", "as_json"):
            raise ValueError(f"--compare shows two finished runs as they are; leave out {parameter.opts[0]}")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give whole numbers separated by commas, such as 2,4,8") from error
