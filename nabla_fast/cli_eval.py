"""`nabla-fast eval`: accuracy and cost of decoding methods on a task, and two such runs side by side."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_fast.cli_config import configured, with_config_options
from nabla_fast.cli_models import choose_pair, load_models, pair_defaults, require_models
from nabla_fast.config import NablaConfig

if TYPE_CHECKING:
    from nabla_fast.evaluation.methods import Models
    from nabla_fast.evaluation.ray_engine import Cluster
    from nabla_fast.evaluation.tasks import Task

_TASK = "Task"
_RUN = "Run"
_ENGINE = "Engine"
_MODELS = "Models"

_ARITHMETIC = "arithmetic"


_Task = Annotated[
    str | None,
    typer.Option(
        help="reasoning_gym:NAME; arithmetic, the bundled pair's; a .jsonl file of prompt and answer; math500, "
        "aime2024, aime2025 or amc; or a hub data set id with its columns.",
        metavar="TASK",
        rich_help_panel=_TASK,
    ),
]
_TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A parameter of a reasoning-gym task, such as min_digits=2; give the option again for another one.",
        metavar="NAME=VALUE",
        rich_help_panel=_TASK,
    ),
]
_MaxProblems = Annotated[int | None, typer.Option(help="Take this many problems. Default: all.", rich_help_panel=_TASK)]
_PromptColumn = Annotated[str | None, typer.Option(help="Column or key of the questions.", rich_help_panel=_TASK)]
_AnswerColumn = Annotated[
    str | None, typer.Option(help="Column or key of the reference answers.", rich_help_panel=_TASK)
]
_Split = Annotated[
    str | None, typer.Option(help="Split of a hub data set or of arithmetic. Default: test.", rich_help_panel=_TASK)
]
_Methods = Annotated[str, typer.Option(help="Separated by commas.", rich_help_panel=_RUN)]
_N = Annotated[
    str,
    typer.Option(
        help="Samples of self-consistency and best-of-n, and max_rollouts of nabla; several separated by commas.",
        metavar="N,N,...",
        rich_help_panel=_RUN,
    ),
]
_Seeds = Annotated[
    str, typer.Option(help="Separated by commas; greedy takes the first.", metavar="SEED,...", rich_help_panel=_RUN)
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the results; a run that was stopped goes on in it.", metavar="DIR", rich_help_panel=_RUN
    ),
]
_BatchSize = Annotated[int, typer.Option(help="Most sequences decoded together.", rich_help_panel=_RUN)]
_RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try problems again that failed before.", rich_help_panel=_RUN)
]
_Profile = Annotated[
    Path | None,
    typer.Option(
        help="Directory for a trace of the first 2 problems, which every method decodes once more for it at its "
        "smallest n and with 64 tokens at most, and for the seconds per phase of the whole run.",
        metavar="DIR",
        rich_help_panel=_RUN,
    ),
]
_Engine = Annotated[
    str, typer.Option(help="local (this process) or ray (workers on a Ray cluster).", rich_help_panel=_ENGINE)
]
_RayAddress = Annotated[
    str | None,
    typer.Option(
        help="A Ray cluster's address, or auto for the one of this machine. Default: start one here.",
        metavar="ADDRESS",
        rich_help_panel=_ENGINE,
    ),
]
_Workers = Annotated[
    int | None, typer.Option(help="Ray workers. Default: as many as there is room for.", rich_help_panel=_ENGINE)
]
_CpusPerWorker = Annotated[
    int | None,
    typer.Option(help="CPU cores of a Ray worker. Default: 4, or all there are.", rich_help_panel=_ENGINE),
]
_CompareTwo = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Put two runs on the same problems side by side instead.", metavar="DIR DIR"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
_Model = Annotated[
    str | None,
    typer.Option(
        help="Language model: GGUF file, safetensors directory or hub id.", metavar="PATH", rich_help_panel=_MODELS
    ),
]
_RewardModel = Annotated[
    str | None,
    typer.Option(
        help="Reward model: sequence classifier with one label, or a peft adapter.",
        metavar="PATH",
        rich_help_panel=_MODELS,
    ),
]
_Demo = Annotated[
    bool,
    typer.Option(
        "--demo",
        help="SmolLM2-135M with its reward model, its settings, and tasks of the size that they are made for.",
        rich_help_panel=_MODELS,
    ),
]
_Bundled = Annotated[
    bool,
    typer.Option(
        "--bundled",
        help="The small arithmetic models that ship with the package, their settings, and --task arithmetic.",
        rich_help_panel=_MODELS,
    ),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODELS)]
_Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64.", rich_help_panel=_MODELS)]
_Attention = Annotated[str, typer.Option(help="auto, flash_attention_2, sdpa or eager.", rich_help_panel=_MODELS)]


@partial(with_config_options, without=("seed", "max_batch_size"))
def evaluate(
    context: typer.Context,
    task: _Task = None,
    task_option: _TaskOption = None,
    max_problems: _MaxProblems = None,
    prompt_column: _PromptColumn = None,
    answer_column: _AnswerColumn = None,
    split: _Split = None,
    methods: _Methods = "greedy,self-consistency,best-of-n,nabla",
    n: _N = "8",
    seeds: _Seeds = "0",
    out: _Out = None,
    batch_size: _BatchSize = 8,
    retry_failed: _RetryFailed = False,
    profile: _Profile = None,
    engine: _Engine = "local",
    ray_address: _RayAddress = None,
    workers: _Workers = None,
    cpus_per_worker: _CpusPerWorker = None,
    compare: _CompareTwo = None,
    as_json: _Json = False,
    model: _Model = None,
    reward_model: _RewardModel = None,
    demo: _Demo = False,
    bundled: _Bundled = False,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    attn_implementation: _Attention = "auto",
    **settings: Any,
) -> None:
    """Measures accuracy and cost of greedy decoding, self-consistency, Best-of-N and ∇-Reasoner on a task."""
    if compare is not None:
        _refuse_others(context)
        _compare(*compare, as_json)
        return
    pair = choose_pair(demo, bundled)
    task = _ARITHMETIC if task is None and pair == "bundled" else task
    if task is None or out is None:
        raise ValueError(f"{'--task' if task is None else '--out'} is missing; give --task and --out, or --compare")
    require_models(model, reward_model, pair)
    from nabla_fast import console
    from nabla_fast.evaluation.runner import describe, make_plan, open_run

    cluster = _cluster(engine, ray_address, workers, cpus_per_worker, device)
    _prepare(profile, cluster)
    numbers = _integers("--n", n), _integers("--seeds", seeds)
    config = _with_key(configured(pair_defaults(pair)[0], settings))
    plan = make_plan(_names(methods), *numbers, config, batch_size=batch_size, max_rollouts=settings["max_rollouts"])
    source = _source(model, reward_model, pair, device, dtype, attn_implementation)
    with console.status("preparing the problems"):
        problems = _problems(task, task_option or [], pair, max_problems, prompt_column, answer_column, split)
    run = partial(console.evaluate, cluster=cluster, retry_failed=retry_failed, as_json=as_json, profile=profile)
    # The directory first: a mistake there should not have to wait for the models.
    with open_run(out, describe(plan, problems, source), plan.keys(problems.problems)) as journal:
        named = (_absolute(model), _absolute(reward_model), pair, device, dtype, attn_implementation)
        load = partial(_load, *named, config)
        failed = run(load, problems, plan, journal, out)
    raise typer.Exit(1 if failed else 0)


def _with_key(config: NablaConfig) -> NablaConfig:
    """The key of the environment in its place: workers on other machines have an environment of their own."""
    key = os.environ.get("VLLM_API_KEY")
    return config.replace(vllm_api_key=key) if key and config.vllm_url and config.vllm_api_key is None else config


def _load(
    model: str | None,
    reward_model: str | None,
    pair: str | None,
    device: str,
    dtype: str,
    attn_implementation: str,
    config: NablaConfig,
) -> Models:
    """Called where the models are to be: in this process, or in each worker."""
    from nabla_fast.evaluation import methods

    return methods.load(*load_models(model, reward_model, pair, device, dtype, attn_implementation), config)


def _absolute(path: str | None) -> str | None:
    """A local path as workers find it, whose working directory is another one; a hub id as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _cluster(
    engine: str, ray_address: str | None, workers: int | None, cpus_per_worker: int | None, device: str
) -> Cluster | None:
    options = {"--ray-address": ray_address, "--workers": workers, "--cpus-per-worker": cpus_per_worker}
    if engine == "local":
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option} is {value}, but --engine is local; give --engine ray, or leave it out")
        return None
    if engine != "ray":
        raise ValueError(f"--engine is {engine!r}; use local or ray")
    from nabla_fast.evaluation.ray_engine import Cluster
    from nabla_fast.models.loading import choose_device

    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index:
        raise ValueError(f"--device is {device}, but Ray gives each worker a GPU of its own; use --device cuda")
    return Cluster(ray_address, workers, cpus_per_worker, chosen.type == "cuda")


def _prepare(profile: Path | None, cluster: Cluster | None) -> None:
    """Finds a mistake in --profile before anything is loaded."""
    from nabla_fast import profiling

    if profile is None:
        return
    if cluster is not None:
        raise ValueError(
            f"--profile is {profile}, but --engine is ray; a trace is of one process, so use --engine local"
        )
    profiling.prepare(profile)


def _source(
    model: str | None, reward_model: str | None, pair: str | None, device: str, dtype: str, attn_implementation: str
) -> dict[str, str | None]:
    """Where the models come from and how they are run, as two runs must share it to share a directory."""
    from nabla_fast.models.loading import choose_attention, choose_device, choose_dtype

    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    # Refused here if it is unknown; what "auto" comes to may differ from one machine of a cluster to another.
    choose_attention(attn_implementation, chosen, kind)
    return {
        "model": pair or model,
        "reward_model": pair or reward_model,
        "device": str(chosen),
        "dtype": str(kind).removeprefix("torch."),
        "attn_implementation": attn_implementation,
    }


def _refuse_others(context: typer.Context) -> None:
    """Raises ValueError for an option that means nothing beside --compare, which would seem to have been heard."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT" and parameter.name not in ("compare", "as_json"):
            raise ValueError(f"--compare shows two finished runs as they are; leave out {parameter.opts[0]}")


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from nabla_fast import terminal
    from nabla_fast.evaluation import report

    comparison = report.compare(first, second)
    if as_json:
        terminal.print_json(comparison)
    else:
        terminal.OUT.print(*report.comparison_tables(comparison))


def _problems(
    name: str,
    options: list[str],
    pair: str | None,
    max_problems: int | None,
    prompt_column: str | None,
    answer_column: str | None,
    split: str | None,
) -> Task:
    from nabla_fast.demo.tasks import TASKS
    from nabla_fast.evaluation.tasks import GYM_PREFIX, load_task, parse_options

    own = TASKS.get(name.removeprefix(GYM_PREFIX), {}) if pair == "demo" and name.startswith(GYM_PREFIX) else {}
    return load_task(
        name,
        {**own, **parse_options(options)},
        max_problems=max_problems,
        prompt_column=prompt_column,
        answer_column=answer_column,
        split=split,
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give whole numbers separated by commas, such as 2,4,8") from error
