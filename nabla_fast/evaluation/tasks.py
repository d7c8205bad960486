"""What is asked: reasoning-gym tasks, local files of problems, data sets of the Hugging Face hub."""

from __future__ import annotations

import ast
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from nabla_fast.evaluation import arithmetic
from nabla_fast.evaluation.grading import Grader, GymGrader, MathGrader, is_number
from nabla_fast.models.chat import as_chats
from nabla_fast.text_files import parse_json_line, read_lines

GYM_PREFIX = "reasoning_gym:"
ARITHMETIC = "arithmetic"
_ARITHMETIC_SIZE = 500
_GYM_SIZE = 500
_GYM_LOOK = 50
# Problems that are made, not read, could be as many as anybody asks for.
_MOST = 100_000
_TAGGED = "\n\nGive your final answer between <answer> and </answer> tags."
_BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        id: stays the same from run to run.
        chat: the messages that ask it.
        reference: the reference answer.
    """

    id: str
    chat: tuple[Mapping[str, str], ...]
    reference: str


@dataclass(frozen=True)
class Task:
    """Problems and who grades them.

    Attributes:
        name: as the user gave it.
        problems: in the order of their source, at least one.
        grader: of all of them.
        description: what the problems depend on, plain data for ``config.json``.
    """

    name: str
    problems: list[Problem]
    grader: Grader
    description: dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A hub data set whose columns are known; ``suffix`` is written after each question."""

    dataset: str
    prompt_column: str
    answer_column: str
    split: str
    suffix: str = _BOXED


PRESETS = {
    "math500": Preset("HuggingFaceH4/MATH-500", "problem", "answer", "test"),
    "aime2024": Preset("HuggingFaceH4/aime_2024", "problem", "answer", "train"),
    "aime2025": Preset("math-ai/aime25", "problem", "answer", "test"),
    "amc": Preset("math-ai/amc23", "question", "answer", "test"),
}
ACCEPTED = (
    f"{GYM_PREFIX}NAME, {ARITHMETIC}, a .jsonl file, {', '.join(PRESETS)}, or a hub data set id with "
    "--prompt-column and --answer-column"
)


def load_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    max_problems: int | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    split: str | None = None,
) -> Task:
    """The task that ``name`` means.

    Args:
        name: ``reasoning_gym:NAME``, ``arithmetic`` (the bundled pair's), the path of a .jsonl file, one of `PRESETS`,
            or a hub data set id.
        options: parameters of a reasoning-gym task; its seed is 0 and its size 500 where they are not given. Those of
            arithmetic are its seed alone; it has 500 problems unless ``max_problems`` says otherwise.
        max_problems: take this many problems from the start; None takes all.
        prompt_column, answer_column: of a hub data set, or keys of a .jsonl file ("prompt" and "answer" if None).
        split: of a hub data set or of arithmetic; None is the preset's, else "test".

    Raises:
        ValueError: for a name, option, column or line that cannot be used; the message names it.
        FileNotFoundError: if there is no such file.
        ImportError: if the library that the task needs is not installed.
    """
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"--max-problems is {max_problems}; give at least 1")
    if max_problems is not None and max_problems > _MOST and (name == ARITHMETIC or name.startswith(GYM_PREFIX)):
        raise ValueError(f"--max-problems is {max_problems}; {name} makes at most {_MOST}")
    columns = {"--prompt-column": prompt_column, "--answer-column": answer_column}
    if name.startswith(GYM_PREFIX):
        _refuse({**columns, "--split": split}, f"{name} has no columns")
        return _gym_task(name, dict(options or {}), max_problems)
    if name == ARITHMETIC:
        _refuse(columns, f"{name} has no columns")
        return _arithmetic_task(dict(options or {}), split or "test", max_problems)
    if options:
        raise ValueError(f"--task-option is {next(iter(options))}, but only {GYM_PREFIX}NAME tasks have parameters")
    if name.endswith(".jsonl"):
        _refuse({"--split": split}, f"{name} has no splits")
        keys = (prompt_column or "prompt", answer_column or "answer")
        return _file_task(name, keys, max_problems)
    if name in PRESETS:
        preset = PRESETS[name]
        _refuse(columns, f"{name} knows its columns")
        return _hub_task(name, preset, split or preset.split, max_problems)
    if name.count("/") != 1 or Path(name).exists():
        raise ValueError(f"--task is {name!r}; use {ACCEPTED}")
    if not (prompt_column and answer_column):
        raise ValueError(
            f"--task is {name!r}, a hub data set; say with --prompt-column and --answer-column where its questions and "
            "answers are"
        )
    return _hub_task(name, Preset(name, prompt_column, answer_column, "test", ""), split or "test", max_problems)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """``name=value`` pairs as a dictionary; values are Python or JSON literals, else strings.

    Raises:
        ValueError: for a text without "=" or a name that is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.strip()):
            raise ValueError(f"--task-option is {text!r}; give NAME=VALUE, such as min_digits=2")
        if name.strip() in options:
            raise ValueError(f"--task-option {name.strip()} is given twice")
        options[name.strip()] = _literal(value.strip())
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"--task-option is {text!r}; the value must be finite, and plain data") from None
    return options


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _refuse(options: Mapping[str, str | None], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} is {value!r}, but {why}; leave it out")


def _require_known(task: str, options: Mapping[str, Any], known: set[str]) -> None:
    for name in sorted(set(options) - known):
        raise ValueError(f"--task-option is {name}, which {task} does not have; it has {', '.join(sorted(known))}")


def _task(name: str, problems: list[Problem], grader: Grader, **source: Any) -> Task:
    text = json.dumps([[p.id, [dict(m) for m in p.chat], p.reference] for p in problems], sort_keys=True)
    digest = sha256(text.encode()).hexdigest()[:16]
    return Task(name, problems, grader, {"name": name, **source, "problems": len(problems), "fingerprint": digest})


def _gym_task(task: str, options: dict[str, Any], max_problems: int | None) -> Task:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f'{task} needs reasoning-gym; run pip install "nabla_fast[eval]"') from error
    name = task.removeprefix(GYM_PREFIX)
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=4) or sorted(DATASETS)
        raise ValueError(f"--task is {task!r}, which reasoning-gym does not have; use one of {', '.join(close)}")
    _require_known(task, options, {field.name for field in fields(DATASETS[name][1])})
    settings = {"seed": 0, "size": max(_GYM_SIZE, max_problems or 0), **options}
    try:
        dataset = reasoning_gym.create_dataset(name, **settings)
        # The same look whatever max_problems is, and not at a problem's own answer, which would give it away.
        numbers = all(is_number(str(dataset[i]["answer"])) for i in range(min(len(dataset), _GYM_LOOK)))
        entries = {f"{name}/{i:04d}": dataset[i] for i in range(min(len(dataset), max_problems or len(dataset)))}
    except (AssertionError, TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise ValueError(f"--task-option: {task} refuses {given}: {error}") from error
    if not entries:
        raise ValueError(f"--task-option: {task} has no problem with size={settings['size']!r}; give at least 1")
    suffix = "" if numbers else _TAGGED
    problems = [
        Problem(key, ({"role": "user", "content": entry["question"] + suffix},), str(entry["answer"]))
        for key, entry in entries.items()
    ]
    return _task(task, problems, GymGrader(dataset, entries, numbers), options=settings)


def _arithmetic_task(options: dict[str, Any], split: str, max_problems: int | None) -> Task:
    _require_known(ARITHMETIC, options, {"seed"})
    if split not in arithmetic.SPLITS:
        raise ValueError(f"--split is {split!r}; {ARITHMETIC} has {', '.join(arithmetic.SPLITS)}")
    seed = options.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"--task-option: seed is {seed!r}; give a whole number")
    drawn = islice(arithmetic.problems(split, seed=seed), max_problems or _ARITHMETIC_SIZE)
    problems = [
        Problem(f"{ARITHMETIC}/{i:04d}", ({"role": "user", "content": problem.question},), str(problem.answer))
        for i, problem in enumerate(drawn)
    ]
    return _task(ARITHMETIC, problems, MathGrader(), split=split, seed=seed)


def _file_task(name: str, keys: tuple[str, str], max_problems: int | None) -> Task:
    file = Path(name)
    lines = read_lines(file, "--task")
    problems = [_file_problem(file, number, line, keys) for number, line in lines][:max_problems]
    if not problems:
        raise ValueError(f"--task: {file} holds no problem")
    for problem_id, times in Counter(problem.id for problem in problems).items():
        if times > 1:
            raise ValueError(f'--task: two problems of {file} have the "id" {problem_id}; give each its own')
    return _task(name, problems, MathGrader(), prompt_column=keys[0], answer_column=keys[1])


def _file_problem(file: Path, number: int, line: str, keys: tuple[str, str]) -> Problem:
    where = f"--task: line {number} of {file}"
    value = parse_json_line(file, "--task", number, line)
    if not isinstance(value, dict):
        raise ValueError(f'{where} must be an object with "{keys[0]}" and "{keys[1]}", got {line.strip()[:80]}')
    for key in keys:
        if key not in value:
            raise ValueError(f'{where} has no "{key}"; it has {", ".join(value) or "nothing"}')
    return _problem(str(value.get("id", f"line-{number:05d}")), value[keys[0]], value[keys[1]], where)


def _problem(problem_id: str, prompt: Any, answer: Any, where: str, suffix: str = "") -> Problem:
    number = isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer)
    if not number and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"{where} has the answer {answer!r}; an answer is text or a finite number")
    try:
        (chat,) = as_chats(prompt + suffix if isinstance(prompt, str) and prompt.strip() else prompt)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has a prompt that cannot be used: {error}") from error
    return Problem(problem_id, tuple({k: m[k] for k in ("role", "content")} for m in chat), str(answer).strip())


def _hub_task(name: str, preset: Preset, split: str, max_problems: int | None) -> Task:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'--task {name} is on the hub, which needs datasets; run pip install "nabla_fast[eval]"'
        ) from error
    rows = datasets.load_dataset(preset.dataset, split=split)
    for option, column in (("--prompt-column", preset.prompt_column), ("--answer-column", preset.answer_column)):
        if column not in rows.column_names:
            raise ValueError(f"{option} is {column!r}; {preset.dataset} has {', '.join(rows.column_names)}")
    problems = [
        _problem(
            f"{name}/{i:04d}",
            row[preset.prompt_column],
            row[preset.answer_column],
            f"--task: row {i} of {preset.dataset}",
            preset.suffix,
        )
        for i, row in enumerate(islice(rows, max_problems))
    ]
    if not problems:
        raise ValueError(f"--task: {preset.dataset} has no rows in the split {split!r}")
    columns = {"prompt_column": preset.prompt_column, "answer_column": preset.answer_column}
    return _task(name, problems, MathGrader(), dataset=preset.dataset, split=split, **columns)
