"""Options that several commands have: the models, and every field of `NablaConfig`, made from the dataclass itself."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from typing import Annotated, Any

import typer

from nabla_fast.cli.models import OLD_PAIR_OPTIONS, PAIR_NAMES
from nabla_fast.config import PRESETS, NablaConfig, Sampling
from nabla_fast.models.quantization import QUANTIZATIONS
from nabla_fast.models.steps import AGGREGATIONS

_task = partial(typer.Option, rich_help_panel="Task")
_TASK_HELP = (
    "reasoning_gym:NAME; arithmetic, which --pair arithmetic is for; a .jsonl file of prompt and answer; math500, "
    "aime2024, aime2025 or amc; or a hub data set id with its columns."
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
TaskName = Annotated[str | None, _task(help=_TASK_HELP, metavar="TASK")]
PromptColumn = Annotated[str | None, _task(help="Column or key of the questions.")]
AnswerColumn = Annotated[str | None, _task(help="Column or key of the reference answers.")]
Split = Annotated[str | None, _task(help="Split of a hub data set or of arithmetic. Default: test.")]

_SAMPLING_FIELDS = ("rollout", "resample")
_PANEL = "∇-Reasoner settings"
_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str}


class _Off:
    """The value "none" on the command line, as different from an option that was not given."""


def with_shared_options(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Replaces the ``**settings`` of a typer command by options.

    They are those of the models (`nabla_fast.cli.models.chosen_models`), ``--preset``, and one for each field of
    `NablaConfig`; fields in ``without`` get none.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own += _model_options() + [parameter for parameter in _config_options() if parameter.name not in without]
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command


def configured(base: NablaConfig | None, settings: dict[str, Any]) -> NablaConfig:
    """What ``--preset`` names, else ``base`` (None: the defaults), with the options that were given.

    Raises:
        ValueError: for an unknown preset, or a value out of range.
    """
    preset = settings.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; use one of {', '.join(PRESETS)}")
    config = (base or NablaConfig()) if preset is None else NablaConfig.published(preset)
    given = {name: None if isinstance(v, _Off) else v for name, v in settings.items() if v is not None and v != []}
    changes = {name: value for name, value in given.items() if name in {f.name for f in fields(NablaConfig)}}
    for name in _SAMPLING_FIELDS:
        own = getattr(config, name)
        parts: dict[str, Any] = {f.name: given.get(f"{name}_{f.name}", getattr(own, f.name)) for f in fields(Sampling)}
        changes[name] = Sampling(**parts)
    return config.replace(**changes)


def _model_options() -> list[inspect.Parameter]:
    reward = "Reward model: sequence classifier with one label, a peft adapter, or a process reward model."
    pair = (
        "smollm2: SmolLM2-135M with its reward model; arithmetic: the small models that ship with the package, for "
        "arithmetic alone; arithmetic-steps: with a process reward model. Each brings settings, a question and tasks "
        "of its own."
    )
    how = {
        "device": "Of the models: auto, cpu, cuda or cuda:N.",
        "dtype": "auto (bfloat16 where the device multiplies it, else float32), bfloat16, float16, float32 or float64.",
        "attn_implementation": (
            "Attention of both models: auto, flash_attention_2, sdpa, eager, another name that transformers knows, or "
            "a kernel of the hub such as kernels-community/flash-attn3."
        ),
    }
    reward_device = "The reward model's, where it is another: cpu, cuda or cuda:N. Default: as --device."
    separator = (
        "What a process reward model is read at, the end of a step; \\n is a line break. Default: that of its kind; a "
        "token classifier has none."
    )
    aggregation = f"Reward of the scores of an answer's steps: {', '.join(AGGREGATIONS)}. Default: min."
    insert_after = (
        "Text behind which the separator is put into what a process reward model reads, if answers do not have it. "
        "Default: a blank line for added tokens of its tokenizer such as <extra_0>, else none is put in."
    )
    option = partial(_option, panel="Models")
    quantization = (
        "Of the linear layers of both models: int8 (torchao), bnb-8bit or bnb-4bit (bitsandbytes), or none, which "
        "leaves a checkpoint as it was saved, quantised or not."
    )
    adapter = "Sub-folder of {} that holds the peft adapter, where there are several."
    named = "Language model: GGUF file, safetensors directory or hub id, also of a peft adapter."
    return [
        option("model", str | None, named, metavar="PATH"),
        option("reward_model", str | None, reward, metavar="PATH"),
        option("pair", str | None, pair, metavar="|".join(PAIR_NAMES)),
        *(option(old, bool, f"Old name of --pair {new}.", False, hidden=True) for old, new in OLD_PAIR_OPTIONS.items()),
        *(option(name, str, text, "auto") for name, text in how.items()),
        option("reward_device", str | None, reward_device, metavar="TEXT"),
        option("quantization", str, quantization, "none", metavar="|".join(QUANTIZATIONS)),
        option("adapter", str | None, adapter.format("--model"), metavar="NAME"),
        option("reward_adapter", str | None, adapter.format("--reward-model"), metavar="NAME"),
        option("step_separator", Any, separator, parser=_escaped, metavar="TEXT"),
        option("step_aggregation", str | None, aggregation, metavar="|".join(AGGREGATIONS)),
        option("step_insert_after", Any, insert_after, parser=_escaped, metavar="TEXT"),
    ]


def _config_options() -> list[inspect.Parameter]:
    preset = (
        f"The published settings for a benchmark, {', '.join(PRESETS[:-1])} or {PRESETS[-1]}, instead of the defaults "
        "below and those of --pair; options that are given override it."
    )
    parameters = [_option("preset", str | None, preset, metavar="NAME")]
    described, parts = _descriptions(NablaConfig), _descriptions(Sampling)
    for field in fields(NablaConfig):
        default, text = getattr(NablaConfig(), field.name), described[field.name]
        if field.name not in _SAMPLING_FIELDS:
            parameters.append(_setting(field.name, str(field.type), default, text))
            continue
        for part in fields(Sampling):
            name, told = f"{field.name}_{part.name}", f"{text} {parts[part.name]}"
            parameters.append(_setting(name, str(part.type), getattr(default, part.name), told))
    return parameters


def _setting(name: str, kind: str, default: Any, text: str) -> inspect.Parameter:
    """The option for a field of `NablaConfig` of type ``kind``; not given, it is None."""
    text = f"{text} Default: {'none' if default is None or default == () else default}."
    if kind == "bool":
        return _option(name, bool | None, text)
    if kind.startswith("tuple"):
        return _option(name, (list[int] if "int" in kind else list[str]) | None, text)
    if kind.startswith("dict"):
        return _option(name, Any, text, parser=_json_object, metavar="JSON")
    if kind.endswith("| None"):
        plain = kind.split()[0]
        return _option(name, Any, text, parser=_or_none(_KINDS[plain]), metavar=plain.upper())
    return _option(name, _KINDS[kind] | None, text)


def _option(
    name: str, kind: Any, text: str, default: Any = None, *, panel: str = _PANEL, **extra: Any
) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    if kind == bool | None:
        flag += f"/--no-{flag[2:]}"
    # Of a setting, the default stands in the text.
    option = typer.Option(flag, help=text, rich_help_panel=panel, show_default=default is not None, **extra)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _or_none(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return _Off() if text.lower() == "none" else kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"must be a number or 'none', got {text!r}") from error

    return parse


def _escaped(text: str) -> str:
    """``text`` with line breaks and tabs, which shells hardly let one type."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _json_object(text: str) -> Any:
    try:
        value = _Off() if text.lower() == "none" else json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict | _Off):
        raise typer.BadParameter(
            f"must be a JSON object such as '{{\"enable_thinking\": false}}', or 'none', got {text!r}"
        )
    return value


def _descriptions(cls: type) -> dict[str, str]:
    """Field name → its description in the class docstring's "Attributes" section."""
    section = inspect.cleandoc(cls.__doc__ or "").split("Attributes:")[1]
    entries = re.split(r"\n    (?=\w+: )", section)
    pairs = (entry.split(": ", 1) for entry in entries if ": " in entry)
    return {name.strip(): _sentence(text) for name, text in pairs}


def _sentence(text: str) -> str:
    words = " ".join(text.replace("``", "").split())
    return words[:1].upper() + words[1:]
