"""The bundled pair's tokenizer and training batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nabla_fast.demo.answers import scored_tail
from nabla_fast.demo.arithmetic import Arithmetic, draw_problem, write_solution
from nabla_fast.models.chat import conversation_frame, generation_prompt_ids

SPECIAL = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """A tokenizer that reads and writes digits one by one, without loss for the texts of these problems."""
    words = [*"0123456789", " + ", " - ", " * ", " = ", "\n", "\\boxed{", "}", "Compute ", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" [-+*=] |\\boxed\{|Compute |\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Conversations:
    """A padded batch.

    Attributes:
        ids: (B, T) int64, right-padded.
        mask: (B, T) int64, 0 on the padding.
        targets: (B, T). For the policy the next token's id, -100 where none is learnt (int64). For the reward model
            `labels`, -1 outside the response (float32).
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor


def chat(problem: Arithmetic) -> list[dict[str, str]]:
    """The chat that asks a problem."""
    return [{"role": "user", "content": problem.question}]


def training_problem(rng: random.Random) -> Arithmetic:
    """A problem that is in no held-out split."""
    while (problem := draw_problem(rng)).split != "train":
        pass
    return problem


def policy_batch(tokenizer: Any, rng: random.Random, size: int) -> Conversations:
    """New problems with their solutions."""
    rows, targets = [], []
    for _ in range(size):
        problem = training_problem(rng)
        prompt = generation_prompt_ids(tokenizer, chat(problem))
        answer = [*_encode(tokenizer, problem.solution), tokenizer.eos_token_id]
        rows.append([*prompt, *answer])
        targets.append([-100] * (len(prompt) - 1) + answer + [-100])
    return _pad(tokenizer, rows, targets, -100, torch.long)


def reward_batch(
    tokenizer: Any, rng: random.Random, size: int, sampled: Sequence[tuple[Arithmetic, list[int]]]
) -> Conversations:
    """Responses of all kinds with their `labels`: sampled ones, solutions, near misses and corruptions.

    Args:
        sampled: responses (token ids) that the policy wrote to training problems.
    """
    rows, targets = [], []
    for _ in range(size):
        kind = rng.random()
        if kind < 0.4:
            problem, answer = rng.choice(sampled)
        else:
            problem = training_problem(rng)
            answer = [*_encode(tokenizer, problem.solution), tokenizer.eos_token_id]
            if kind < 0.7:
                answer = [*_encode(tokenizer, near_miss(problem, rng)), tokenizer.eos_token_id]
            elif kind < 0.85:
                answer = corrupted(answer, len(tokenizer), rng)
        frame = conversation_frame(tokenizer, chat(problem))
        tail = scored_tail(frame, answer)
        rows.append([*frame.opening, *tail])
        targets.append([-1.0] * len(frame.opening) + labels(tokenizer, problem, answer, len(tail)))
    return _pad(tokenizer, rows, targets, -1.0, torch.float32)


def labels(tokenizer: Any, problem: Arithmetic, answer: Sequence[int], length: int) -> list[float]:
    """1 for every token up to which ``answer`` is the solution; for its end, 1 if it is all of the solution.

    The end of a wrong answer gets half the share of it that is right: a reward that rises when the first wrong token
    is mended has a gradient that points there, although the steps behind it are still those of the mistake.
    """
    solution = [*_encode(tokenizer, problem.solution), tokenizer.eos_token_id]
    same = 0
    while same < min(len(answer), len(solution)) and answer[same] == solution[same]:
        same += 1
    body = len(answer) - 1 if answer and answer[-1] == tokenizer.eos_token_id else len(answer)
    end = 1.0 if same >= len(solution) - 1 and body == len(solution) - 1 else 0.5 * same / len(solution)
    return [float(i < same) for i in range(body)] + [end] * (length - body)


def near_miss(problem: Arithmetic, rng: random.Random) -> str:
    """The solution with one result wrong by a digit, carried through the steps that follow or not."""
    at = rng.randrange(len(problem.steps))
    left, operator, right, result = problem.steps[at]
    digits = list(str(result))
    place = rng.randrange(len(digits))
    lowest = 1 if place == 0 and len(digits) > 1 else 0
    near = [d for d in (int(digits[place]) - 1, int(digits[place]) + 1) if lowest <= d <= 9]
    other = [d for d in range(lowest, 10) if d != int(digits[place])]
    digits[place] = str(rng.choice(near if rng.random() < 0.5 else other))
    wrong = int("".join(digits))
    steps = [*problem.steps]
    steps[at] = (left, operator, right, wrong)
    if rng.random() < 0.7:
        changed = {result: wrong}
        for i in range(at + 1, len(steps)):
            a, operator, b, old = steps[i]
            if operator == "*":
                continue
            a, b = changed.get(a, a), changed.get(b, b)
            value = a + b if operator == "+" else a - b
            steps[i] = (a, operator, b, max(value, 0))
            changed[old] = max(value, 0)
    return write_solution(tuple(steps))


def corrupted(answer: Sequence[int], vocabulary: int, rng: random.Random) -> list[int]:
    """``answer`` with one to four tokens replaced by any others, its end of turn left alone."""
    ids = list(answer)
    for place in rng.sample(range(len(ids) - 1), rng.randint(1, 4)):
        ids[place] = rng.randrange(len(SPECIAL), vocabulary)
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pad(tokenizer: Any, rows: list[list[int]], targets: list[Any], none: float, dtype: torch.dtype) -> Conversations:
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    padded = torch.tensor([row + [none] * (width - len(row)) for row in targets], dtype=dtype)
    return Conversations(ids, mask, padded)
