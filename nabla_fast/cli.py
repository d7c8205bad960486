"""The command line: `nabla-fast generate`, `eval`, `bench` and `doctor`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nabla_fast import __version__, terminal
from nabla_fast.cli_bench import bench
from nabla_fast.cli_config import configured, with_config_options
from nabla_fast.cli_eval import evaluate
from nabla_fast.cli_models import choose_pair, load_models, pair_defaults
from nabla_fast.stopping import StoppedError, stoppable
from nabla_fast.text_files import parse_json_line, read_lines

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a wrong argument, a missing file or a model that returns NaN raises; its message is all a user needs.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError)


def main() -> None:
    """Entry point of ``nabla-fast``."""
    terminal.tolerate_any_text()
    try:
        try:
            with stoppable():
                app()
        finally:
            # Here and not when Python ends, where what goes wrong can no longer be told.
            if sys.stdout is not None:
                sys.stdout.flush()
    except StoppedError as stopped:
        sys.exit(stopped.exit_code)
    except BrokenPipeError:
        # Whoever read the output has seen enough of it.
        _discard_output()
        sys.exit(1)
    except _USER_ERRORS as error:
        terminal.print_error(" ".join(str(error).split()) or type(error).__name__)
        _discard_output()
        sys.exit(2)


def _discard_output() -> None:
    """Lets what standard output would not take go nowhere, or Python tries to write it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nabla-fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """∇-Reasoner made fast: refines a language model's answers by gradient descent on their tokens."""


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
    with terminal.status("loading the models"):
        models = load_models(model, reward_model, pair, device, dtype, attn_implementation)
    console.answer(models, questions, config, compare_greedy=pair is not None, profile=profile, as_json=as_json)


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
        terminal.print_json(report)
    else:
        console.show_report(report)


def _questions(prompt: list[str] | None, file: Path | None, default: str | None) -> list[Any]:
    for text in prompt or []:
        # Python keeps bytes of the command line that are no text as half surrogates.
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"--prompt is {text!a}, which is not text in this terminal's encoding; use --prompts FILE")
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
    lines = read_lines(file, "--prompts")
    if not lines:
        raise ValueError(f"--prompts: {file} holds no prompt")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_json_prompt(file, number, line) for number, line in lines]


def _json_prompt(file: Path, number: int, line: str) -> Any:
    value = parse_json_line(file, "--prompts", number, line)
    prompt = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(
            f'--prompts: line {number} of {file} must be a string, a chat, or an object with "prompt" or "messages"'
        )
    return prompt
