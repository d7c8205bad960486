"""The command line: `nabla-fast generate`, `eval`, `bench` and `doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nabla_fast.cli_bench import bench
from nabla_fast.cli_config import configured, with_config_options
from nabla_fast.cli_eval import evaluate
from nabla_fast.cli_models import choose_pair, load_models, pair_defaults

app = typer.Typer(
    help="∇-Reasoner made fast: refines a language model's answers by gradient descent on their tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a wrong argument, a missing file or a model that returns NaN raises; its message is all a user needs.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)


def main() -> None:
    """Entry point of ``nabla-fast``."""
    try:
        app()
    except _USER_ERRORS as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/] {_one_line(error)}", markup=True, soft_wrap=True)
        sys.exit(2)


@app.command()
@with_config_options
def generate(
    model: Annotated[
        str | None, typer.Option(help="Language model: GGUF file, safetensors directory or hub id.", metavar="PATH")
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(help="Reward model: sequence classifier with one label, or a peft adapter.", metavar="PATH"),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A question; give the option again for another one.", metavar="TEXT")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='One prompt a line; with .jsonl, a string, a chat or {"prompt": ...} a line.', metavar="FILE"
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="SmolLM2-135M with its reward model; greedy against ∇-Reasoner.")
    ] = False,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="The small arithmetic models that ship with the package, likewise.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option(help="Directory for a trace of the ∇-Reasoner run and its seconds per phase.", metavar="DIR"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64.")] = "auto",
    attn_implementation: Annotated[str, typer.Option(help="auto, flash_attention_2, sdpa or eager.")] = "auto",
    **settings: Any,
) -> None:
    """Answers prompts with ∇-Reasoner."""
    from nabla_fast import console, profiling

    pair = choose_pair(demo, bundled)
    base, question = pair_defaults(pair)
    questions = _questions(prompt, prompts, question)
    config = configured(base, settings)
    if profile is not None:
        # A mistake there should not have to wait for the models.
        profiling.prepare(profile)
    with console.status("loading the models"):
        models = load_models(model, reward_model, pair, device, dtype, attn_implementation)
    outcome = console.answer(models, questions, config, compare_greedy=pair is not None, profile=profile)
    if as_json:
        print(json.dumps(outcome.to_dict(), ensure_ascii=False, indent=2))
    else:
        outcome.show()


app.command("eval")(evaluate)
# Its options are those of the script that it runs, which shows them itself.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Shows versions, devices, which back ends are built, and why one is missing."""
    from nabla_fast import console, environment

    report = environment.report()
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        console.show_report(report)


def _questions(prompt: list[str] | None, file: Path | None, default: str | None) -> list[Any]:
    questions: list[Any] = list(prompt or [])
    if file is not None:
        questions += read_prompts(file)
    if not questions:
        if default is None:
            raise ValueError("no prompt given; use --prompt TEXT, --prompts FILE, --demo or --bundled")
        questions = [default]
    return questions


def read_prompts(file: Path) -> list[Any]:
    """Prompts of a file: one a line, or one JSON value a line in a .jsonl file; blank lines are skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no prompt, or a line of it cannot be read; the message gives its number.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--prompts: there is no file {file}")
    lines = [(number, line) for number, line in enumerate(file.read_text().splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {file} holds no prompt")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_json_prompt(file, number, line) for number, line in lines]


def _json_prompt(file: Path, number: int, line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts: line {number} of {file} is not JSON: {error}") from error
    prompt = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(
            f'--prompts: line {number} of {file} must be a string, a chat, or an object with "prompt" or "messages"'
        )
    return prompt


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).replace("[", "\\[") or type(error).__name__
