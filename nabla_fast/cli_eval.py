"""`nabla-fast eval`: accuracy and cost of decoding methods on a task, and two such runs side by side."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_fast.cli_config import configured, with_config_options
from nabla_fast.cli_models import load_models, require_models
from nabla_fast.config import NablaConfig

if TYPE_CHECKING:
    from nabla_fast.evaluation.tasks import Task

_TASK = "Task"
_RUN = "Run"
_MODELS = "Models"

# What a shell reports for a command that Ctrl-C stopped.
_INTERRUPTED = 130


_Task = Annotated[
    str | None,
    typer.Option(
        help="reasoning_gym:NAME; a .jsonl file of prompt and answer; math500, aime2024, aime2025 or amc; or a hub "
        "data set id with its columns.",
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
_Split = Annotated[str | None, typer.Option(help="Split of a hub data set. Default: test.", rich_help_panel=_TASK)]
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
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODELS)]
_Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64.", rich_help_panel=_MODELS)]
_Attention = Annotated[str, typer.Option(help="auto, flash_attention_2, sdpa or eager.", rich_help_panel=_MODELS)]


@partial(with_config_options, without=("seed",))
def evaluate(
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
    compare: _CompareTwo = None,
    as_json: _Json = False,
    model: _Model = None,
    reward_model: _RewardModel = None,
    demo: _Demo = False,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    attn_implementation: _Attention = "auto",
    **settings: Any,
) -> None:
    """Measures accuracy and cost of greedy decoding, self-consistency, Best-of-N and ∇-Reasoner on a task."""
    if compare is not None:
        if task or out:
            raise ValueError("--compare shows two finished runs; leave out --task and --out")
        _compare(*compare, as_json)
        return
    if task is None or out is None:
        raise ValueError(f"{'--task' if task is None else '--out'} is missing; give --task and --out, or --compare")
    require_models(model, reward_model, demo)
    from nabla_fast import console
    from nabla_fast.evaluation.runner import describe, make_plan, open_run

    numbers = _integers("--n", n), _integers("--seeds", seeds)
    config = configured(_demo_config() if demo else None, settings)
    rollouts = settings["max_rollouts"]
    plan = make_plan(_names(methods), *numbers, config, batch_size=batch_size, max_rollouts=rollouts)
    source = _source(model, reward_model, demo, device, dtype, attn_implementation)
    problems = _problems(task, task_option or [], demo, max_problems, prompt_column, answer_column, split)
    # The directory first: a mistake there should not have to wait for the models.
    with open_run(out, describe(plan, problems, source)) as journal:
        with console.status("loading the models"):
            models = load_models(model, reward_model, demo, device, dtype, attn_implementation)
        try:
            failed = console.evaluate(models, problems, plan, journal, out, retry_failed=retry_failed, as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
    raise typer.Exit(1 if failed else 0)


def _source(
    model: str | None, reward_model: str | None, demo: bool, device: str, dtype: str, attn_implementation: str
) -> dict[str, str | None]:
    """Where the models come from and how they are run, as two runs must share it to share a directory."""
    from nabla_fast.models.loading import choose_device, choose_dtype

    chosen = choose_device(device)
    return {
        "model": "demo" if demo else model,
        "reward_model": "demo" if demo else reward_model,
        "device": str(chosen),
        "dtype": str(choose_dtype(dtype, chosen)).removeprefix("torch."),
        "attn_implementation": attn_implementation,
    }


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from nabla_fast import console
    from nabla_fast.evaluation import report

    comparison = report.compare(first, second)
    if as_json:
        print(json.dumps(comparison, ensure_ascii=False, indent=2))
    else:
        console.show(*report.comparison_tables(comparison))


def _problems(
    name: str,
    options: list[str],
    demo: bool,
    max_problems: int | None,
    prompt_column: str | None,
    answer_column: str | None,
    split: str | None,
) -> Task:
    from nabla_fast.demo.tasks import TASKS
    from nabla_fast.evaluation.tasks import GYM_PREFIX, load_task, parse_options

    own = TASKS.get(name.removeprefix(GYM_PREFIX), {}) if demo and name.startswith(GYM_PREFIX) else {}
    return load_task(
        name,
        {**own, **parse_options(options)},
        max_problems=max_problems,
        prompt_column=prompt_column,
        answer_column=answer_column,
        split=split,
    )


def _demo_config() -> NablaConfig:
    from nabla_fast.demo import example

    return example.CONFIG


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give whole numbers separated by commas, such as 2,4,8") from error
