"""The reward model's training examples: a problem and answers to it, sampled, edited or written from a template."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_answers import scored_tail
from demo_tasks import Entry, is_right, load_task, task_chat

from nabla_fast.evaluation.grading import answer_span
from nabla_fast.models.chat import conversation_frame

# Sentences SmolLM2 itself answers in.
STYLES: dict[str, tuple[str, ...]] = {
    "products": (
        "{x}",
        "{x}.",
        "{expression} = {x}",
        "{expression} = {x}.",
        "{expression} is {x}.",
        "The answer is {x}.",
        "The result of {expression} is {x}.",
        "{expression} = {x}\n\nThe answer is {x}.",
        "Solve: {expression} = {x}",
    ),
    "gcd": (
        "{x}",
        "{x}.",
        "The answer is {x}.",
        "The GCD is {x}.",
        "The GCD of {first} and {second} is {x}.",
        "The Greatest Common Divisor (GCD) of {first} and {second} is {x}.",
    ),
    "letter_counting": (
        "{x}",
        'The letter "{letter}" appears {x} times in the text.',
        'The letter "{letter}" appears {x} time in the text.',
        'The letter "{letter}" appears {x} times in the text "{text}".',
        'The letter "{letter}" appears {x} time in the text: "{text}".',
    ),
    "chain_sum": (
        "{x}",
        "{x}.",
        "{expression} = {x}",
        "{expression} = {x}.",
        "The answer is {x}.",
        "The final answer is {x}.",
        "The final answer to this arithmetic problem is {x}.",
        "The final answer to the given arithmetic problem is {x}.",
    ),
}


SAMPLED_PER_GROUP = 3


@dataclass(frozen=True)
class Group:
    """One problem with its answers.

    Attributes:
        opening: token ids of the conversation up to the answer.
        answers: pairs of the token ids from the answer to the conversation's end, and whether it is right.
    """

    opening: tuple[int, ...]
    answers: list[tuple[list[int], bool]]


def sampled_groups(files: Sequence[Path], tokenizer: Any) -> list[Callable[[random.Random], Group]]:
    """One maker per sampled problem; each call adds fresh edits to the problem's own samples."""
    records = [record for file in files for record in json.loads(file.read_text())]
    return [_sampled_maker(record, tokenizer) for record in records]


def _sampled_maker(record: dict[str, Any], tokenizer: Any) -> Callable[[random.Random], Group]:
    entry, answers = record["entry"], record["answers"]
    frame = conversation_frame(tokenizer, task_chat(entry))
    dataset = load_task(record["task"], seed=0, size=1)

    def make(draw: random.Random) -> Group:
        chosen = draw.sample(answers, min(SAMPLED_PER_GROUP, len(answers)))
        tails = [(scored_tail(frame, answer["ids"]), bool(answer["right"])) for answer in chosen]
        texts = [answer["text"] for answer in answers if answer_span(answer["text"])]
        if texts:
            # The shorter of two: long answers cost time and teach little about the number.
            text = min((draw.choice(texts) for _ in range(2)), key=len)
            for value in [entry["answer"], *wrong_values(entry, 2, draw)]:
                start, end = answer_span(text) or (0, 0)
                tails.append(_tail(frame, tokenizer, dataset, entry, text[:start] + value + text[end:]))
        return Group(frame.opening, tails)

    return make


def synthetic_group(dataset: Any, index: int, tokenizer: Any, draw: random.Random) -> Group:
    """Problem ``index`` of ``dataset`` with two right and six wrong answers in the model's own sentences."""
    entry = dataset[index]
    frame = conversation_frame(tokenizer, task_chat(entry))
    values = [entry["answer"], entry["answer"], *wrong_values(entry, 6, draw)]
    styles = STYLES[entry["metadata"]["source_dataset"]]
    texts = [draw.choice(styles).format(x=value, **_wording(entry)) for value in values]
    return Group(frame.opening, [_tail(frame, tokenizer, dataset, entry, text) for text in texts])


def wrong_values(entry: Entry, count: int, draw: random.Random) -> list[str]:
    """``count`` wrong numbers of the kinds SmolLM2 gives: near misses, numbers of the question, other sign, others."""
    right = int(entry["answer"])
    question = [int(number) for number in re.findall(r"\d+", entry["question"])]
    near = [right + step for step in (-10, -2, -1, 1, 2, 10)]
    values = {*near, *question, sum(question), right * 2, -right, draw.randrange(0, 82), draw.randrange(0, 20)}
    if entry["metadata"]["source_dataset"] != "chain_sum":
        values = {value for value in values if value >= 0}
    values.discard(right)
    return [str(value) for value in draw.sample(sorted(values), min(count, len(values)))]


def _wording(entry: Entry) -> dict[str, str]:
    facts = entry["metadata"]
    return {
        "expression": facts.get("expression", ""),
        "first": str(facts.get("numbers", [""])[0]),
        "second": str(facts.get("numbers", [""])[-1]),
        "letter": facts.get("target_letter", ""),
        "text": " ".join(facts.get("span", [])),
    }


def _tail(frame: Any, tokenizer: Any, dataset: Any, entry: Entry, text: str) -> tuple[list[int], bool]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return scored_tail(frame, ids), is_right(dataset, entry, text)
