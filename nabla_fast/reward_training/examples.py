"""Training examples: a policy's answers to problems with a verifier, and the forks where another token changes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import NablaConfig
from nabla_fast.evaluation import methods
from nabla_fast.evaluation.journal import Journal
from nabla_fast.evaluation.probe import Fork, probe
from nabla_fast.evaluation.runner import read_json
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.whole_files import write_json

EXAMPLES, SETTINGS = "examples.jsonl", "examples.json"


@dataclass(frozen=True)
class Swap:
    """A position of an answer at which some tokens lead to a right answer and others to a wrong one.

    Attributes:
        answer: which of the example's answers has the position.
        position: in the response, from 0.
        better: tokens whose rollouts were right.
        worse: tokens whose rollouts were wrong.
    """

    answer: int
    position: int
    better: tuple[int, ...]
    worse: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """A response and whether it is right; ``fork`` is the position of the token that it was rolled out from."""

    tokens: tuple[int, ...]
    right: bool
    fork: int | None = None


@dataclass(frozen=True)
class Example:
    """A problem with the policy's answers.

    Attributes:
        problem: id.
        chat: the messages that ask it.
        answers: the response as it was drawn first, then every rollout.
        swaps: in the first answer.
    """

    problem: str
    chat: tuple[Mapping[str, str], ...]
    answers: tuple[Answer, ...]
    swaps: tuple[Swap, ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Example:
        """What `dataclasses.asdict` made of one."""
        answers = tuple(Answer(tuple(a["tokens"]), a["right"], a["fork"]) for a in value["answers"])
        swaps = tuple(Swap(s["answer"], s["position"], tuple(s["better"]), tuple(s["worse"])) for s in value["swaps"])
        return cls(value["problem"], tuple(value["chat"]), answers, swaps)


def collect(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: NablaConfig,
    folder: Path,
    *,
    forks: int = 3,
    batch_size: int = 16,
    on_problems: Callable[[int], None] = lambda _: None,
) -> list[Example]:
    """Draws and labels the examples of a task's problems, or those that ``folder`` lacks.

    Args:
        model: the policy.
        config: says how it samples, and what an uncertain position is.
        forks: most positions of an answer that are looked at.
        batch_size: problems, and most rollouts, at once.
        on_problems: hears how many problems more are done; first, how many were done before.

    Raises:
        GradingError: if a problem cannot be graded.
        ValueError: if ``folder`` holds examples of other problems, or drawn with other settings or another policy.
        BlockingIOError: if another process is writing to it.
    """
    settings = {"policy": str(model.config.name_or_path), "forks": forks, **_drawing(config)}
    require_same(folder / SETTINGS, "examples drawn", settings)
    file = folder / EXAMPLES
    chats = {problem.id: _plain(problem.chat) for problem in task.problems}
    with Journal(file) as journal:
        known = {example.problem: example for example in _examples(file, journal.records)}
        for example in known.values():
            if chats.get(example.problem) != _plain(example.chat):
                told = f"{file} has the problem {example.problem!r}, which is none of this task"
                raise ValueError(f"{told}; use another folder")
        on_problems(len(known))
        left = [problem for problem in task.problems if problem.id not in known]
        models = methods.load(model, tokenizer, _no_reward, None, config)
        for first in range(0, len(left), batch_size):
            some = left[first : first + batch_size]
            part = Task(task.name, some, task.grader, task.description)
            found = probe(models, part, config, forks=forks, batch_size=batch_size, proposals=())
            for problem, drawn in zip(some, found.answers, strict=True):
                own = [fork for fork in found.forks if fork.problem == problem.id]
                known[problem.id] = _example(problem, Answer(drawn.response, bool(drawn.right)), own)
                journal.append(asdict(known[problem.id]))
            on_problems(len(some))
    return [known[problem.id] for problem in task.problems]


def _examples(file: Path, records: Sequence[Mapping[str, Any]]) -> list[Example]:
    found = []
    for number, record in enumerate(records, start=1):
        try:
            found.append(Example.from_dict(record))
        except (KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {file} is no example ({error!r}); use another folder") from error
    return found


def _drawing(config: NablaConfig) -> dict[str, Any]:
    """The settings that examples depend on."""
    told = config.to_dict()
    sampling = ("rollout", "max_new_tokens", "seed", "eos_token_ids", "stop_strings", "chat_template_kwargs")
    forks = ("candidates", "entropy_threshold", "confidence_threshold")
    return {name: told[name] for name in (*sampling, *forks)}


def require_same(file: Path, what: str, settings: Mapping[str, Any]) -> None:
    """Keeps the settings of ``what`` in ``file``, or raises ValueError where it holds others."""
    plain = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, plain)
        return
    found = read_json(file)
    for name in sorted({*found, *plain}):
        old, new = found.get(name), plain.get(name)
        if old != new:
            raise ValueError(f"{file.parent} holds {what} with {name} {old!r}, not {new!r}; use another folder")


def _example(problem: Problem, drawn: Answer, forks: Sequence[Fork]) -> Example:
    answers, swaps = [drawn], []
    for fork in forks:
        labelled = [(candidate.token, bool(candidate.right)) for candidate in fork.candidates]
        better = tuple(token for token, right in labelled if right)
        worse = tuple(token for token, right in labelled if not right)
        if better and worse:
            swaps.append(Swap(0, fork.position, better, worse))
        answers += [Answer(c.response, bool(c.right), fork.position) for c in fork.candidates[1:]]
    return Example(problem.id, tuple(map(dict, problem.chat)), tuple(answers), tuple(swaps))


def _plain(chat: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [dict(message) for message in chat]


def _no_reward(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    """No answer is better than another one: examples are labelled by a verifier alone."""
    return (inputs_embeds * 0).sum((1, 2), dtype=torch.float32)
