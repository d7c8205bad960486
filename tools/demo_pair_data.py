"""The bundled pair's tokenizer and training batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from demo_answers import scored_tail
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nabla_fast.evaluation.arithmetic import Arithmetic, draw_problem, write_solution
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
        following: (B, T) int64, the solution's next token as long as the response is the solution, else -100.
        labels: (B, T) float32, what `labels` says of the response, -1 outside it; None for the policy.
    """

    ids: Tensor
    mask: Tensor
    following: Tensor
    labels: Tensor | None = None

    def to(self, device: torch.device) -> Conversations:
        """The same on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Conversations(self.ids.to(device), self.mask.to(device), self.following.to(device), labels)


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
    rows, following = [], []
    for _ in range(size):
        problem = training_problem(rng)
        prompt = generation_prompt_ids(tokenizer, chat(problem))
        answer = solution_ids(tokenizer, problem)
        rows.append([*prompt, *answer])
        following.append([-100] * (len(prompt) - 1) + answer + [-100])
    return Conversations(*_ids_and_mask(tokenizer, rows), _pad(following, -100, torch.long))


def reward_batch(
    tokenizer: Any, rng: random.Random, size: int, sampled: Sequence[tuple[Arithmetic, list[int]]]
) -> Conversations:
    """Responses of all kinds with their `labels`: sampled ones, solutions, near misses and corruptions.

    Args:
        sampled: responses (token ids) that the policy wrote to training problems.
    """
    rows, targets, following = [], [], []
    for _ in range(size):
        kind = rng.random()
        if kind < 0.4:
            problem, answer = rng.choice(sampled)
        else:
            problem = training_problem(rng)
            answer = solution_ids(tokenizer, problem)
            if kind < 0.7:
                answer = [*_encode(tokenizer, near_miss(problem, rng)), tokenizer.eos_token_id]
            elif kind < 0.85:
                answer = corrupted(answer, len(tokenizer), rng)
        frame = conversation_frame(tokenizer, chat(problem))
        tail = scored_tail(frame, answer)
        rows.append([*frame.opening, *tail])
        targets.append([-1.0] * len(frame.opening) + labels(tokenizer, problem, answer, len(tail)))
        solution = solution_ids(tokenizer, problem)
        learnt = solution[: _same(answer, solution) + 1]
        following.append([-100] * (len(frame.opening) - 1) + learnt)
    ids, mask = _ids_and_mask(tokenizer, rows)
    return Conversations(ids, mask, _pad(following, -100, torch.long, ids.shape[1]), _pad(targets, -1.0, torch.float32))


def solution_ids(tokenizer: Any, problem: Arithmetic) -> list[int]:
    """The solution's tokens, its end of turn among them."""
    return [*_encode(tokenizer, problem.solution), int(tokenizer.eos_token_id)]


def labels(tokenizer: Any, problem: Arithmetic, answer: Sequence[int], length: int) -> list[float]:
    """1 for every token up to which ``answer`` is the solution; for its end, 1 if it is all of the solution.

    The end of a wrong answer gets half the share of it that is right: a reward that rises when the first wrong token
    is mended has a gradient that points there, although the steps behind it are still those of the mistake.
    """
    solution = solution_ids(tokenizer, problem)
    same = _same(answer, solution)
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


def _same(answer: Sequence[int], solution: Sequence[int]) -> int:
    """How many tokens of ``answer`` are the solution's."""
    same = 0
    while same < min(len(answer), len(solution)) and answer[same] == solution[same]:
        same += 1
    return same


def _ids_and_mask(tokenizer: Any, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = _pad(rows, tokenizer.pad_token_id, torch.long)
    return ids, _pad([[1] * len(row) for row in rows], 0, torch.long)


def _pad(rows: list[Any], value: float, dtype: torch.dtype, width: int | None = None) -> Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row[:width] + [value] * (width - len(row)) for row in rows], dtype=dtype)
