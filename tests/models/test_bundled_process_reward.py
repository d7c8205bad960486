"""The process reward model that ships with the package."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch

import nabla_fast as nf
from nabla_fast.demo import arithmetic
from nabla_fast.demo.pairs import PAIRS
from nabla_fast.evaluation.arithmetic import Arithmetic, problems, write_solution
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import ProcessRewardModel, reward_model_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> tuple:
    return PAIRS["arithmetic-steps"].load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reward(models: tuple) -> ProcessRewardModel:
    model, tokenizer, process, reward_tokenizer = models
    language_model = LanguageModel(model, tokenizer)
    found = reward_model_of(process, reward_tokenizer, language_model, tokenizer, language_model.eos_token_ids)
    assert isinstance(found, ProcessRewardModel)
    return found


def wrong(problem: Arithmetic, step: int) -> str:
    """The solution with a digit of one step's result changed, and everything behind as it was."""
    lines = problem.solution.split("\n")
    rng = random.Random(problem.question)
    last = rng.choice([digit for digit in "0123456789" if digit != lines[step][-1]])
    return "\n".join([*lines[:step], lines[step][:-1] + last, *lines[step + 1 :]])


def score(reward: ProcessRewardModel, problem: Arithmetic, response: str, *, ended: bool = True) -> float:
    tokenizer = reward.tokenizer
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    frame = reward.chat_frame([{"role": "user", "content": problem.question}])
    with torch.no_grad():
        (value,), _ = reward.rewards([reward.conversation(frame, torch.tensor(ids), ended=ended)])
    return float(value)


def test_every_step_is_valued_by_whether_all_steps_up_to_it_are_right(reward: ProcessRewardModel) -> None:
    told = apart = 0
    for problem in islice(problems("test"), 30):
        steps = problem.solution.split("\n")
        for end in range(1, len(steps)):
            right = score(reward, problem, "\n".join(steps[:end]))
            mistaken = score(reward, problem, "\n".join(wrong(problem, end - 1).split("\n")[:end]))
            apart += 1
            told += right > 0.5 > mistaken
    assert told / apart > 0.9


def test_every_prefix_is_valued_at_its_last_token(reward: ProcessRewardModel) -> None:
    """Nothing is put behind a step that goes on."""
    told = apart = 0
    for problem in islice(problems("test"), 30):
        first = problem.solution.split("\n")[0]
        place = first.index("= ") + 2
        for digit in "0123456789":
            right = score(reward, problem, first[: place + 1], ended=False)
            other = score(reward, problem, first[:place] + digit, ended=False)
            if digit != first[place]:
                apart += 1
                told += right > other
    assert told / apart > 0.9


def test_a_decode_with_it_answers_the_question_that_greedy_decoding_gets_wrong(models: tuple) -> None:
    out = nf.generate(*models, arithmetic.QUESTION, PAIRS["arithmetic-steps"].config)
    problem = next(p for p in problems("test") if p.question == arithmetic.QUESTION)
    assert out.texts[0] == write_solution(problem.steps)
    assert 0.5 < out.rewards[0] <= 1
