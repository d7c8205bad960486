"""When an answer counts: as soon as it has ended, without its thoughts, and alone where its prompt is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_evaluation_methods import PROMPTS, batch, loaded, models  # noqa: F401
from test_evaluation_runner import FakeModels, answer, describe, made_up, make_task, plan_of, run  # noqa: F401

from nabla_fast.evaluation import runner
from nabla_fast.evaluation.journal import read_records
from nabla_fast.evaluation.methods import METHODS, Answer
from nabla_fast.evaluation.runner import evaluate, open_run
from nabla_fast.evaluation.thoughts import spoken, without_thoughts
from nabla_fast.stats import SequenceStats


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, FloatingPointError])
def test_an_answer_is_on_the_disk_before_the_others_of_its_batch_end(tmp_path, made_up, error):  # noqa: F811
    seen = []

    def broken_off(batch):
        for i, one in enumerate(answer(batch)[:2]):
            batch.on_answer(i, one)
            seen.append(len(read_records(tmp_path / runner.RESULTS)))
        if len(batch.problems) > 1:
            raise error
        return answer(batch)[:1]

    made_up.answer = broken_off
    task, plan = make_task(["a", "b", "c"]), plan_of(methods=["nabla"], n=[2], seeds=[0])
    if error is FloatingPointError:
        records = run(tmp_path, task, plan)
        assert [record["problem"] for record in records] == ["a", "b", "c"], "what was told is not done again"
    else:
        with pytest.raises(error):
            run(tmp_path, task, plan)
    assert seen[:2] == [1, 2]
    assert [r["problem"] for r in read_records(tmp_path / runner.RESULTS)][:2] == ["a", "b"]


def test_a_result_that_cannot_be_written_ends_the_run_and_fails_no_problem(tmp_path, made_up):  # noqa: F811
    def full(record):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run(tmp_path, make_task(["a", "b"]), plan_of(), on_record=full)
    assert all(record["error"] is None for record in read_records(tmp_path / runner.RESULTS))


def test_a_prompt_that_the_template_refuses_fails_alone(tmp_path, made_up):  # noqa: F811
    class Picky(FakeModels):
        def prompt_ids(self, problem):
            if problem.id == "b":
                raise ValueError("prompts[0] is refused by the chat template: no system messages")
            return super().prompt_ids(problem)

    task, plan = make_task(["a", "b", "c"]), plan_of(methods=["nabla"], n=[2], seeds=[0])
    whole = {record["problem"]: record for record in run(tmp_path / "whole", task, plan)}
    out = tmp_path / "out"
    with open_run(out, describe(plan, task, {}), plan.keys(task.problems)) as journal:
        records = {record["problem"]: record for record in evaluate(Picky(), task, plan, journal)}
    assert records["b"]["error"] == "ValueError: prompts[0] is refused by the chat template: no system messages"
    assert records["a"] == whole["a"]
    assert records["c"] == whole["c"]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("12", "12"),
        ("<think>is it 7?</think>12", "12"),
        ("<think>is it 7?", ""),
        ("it is 7?</think>12", "12"),
        ("say <think>7</think>1<think>8</think>2", "say 12"),
        ("7 <think>8</think> 9 </think>12", "12"),
        ("<think>a<think>b</think>12", "12"),
        ("", ""),
    ],
)
def test_thoughts_are_left_out(text, rest):
    assert without_thoughts(text) == rest


class Tokenizer:
    """Letters as they are; the tags are special tokens, which `decode` leaves out when asked to."""

    def __init__(self, special):
        self.all_special_ids = [1000, 1001, 1002] if special else []

    def convert_tokens_to_ids(self, token):
        return {"<think>": 1000, "</think>": 1001}[token]

    def decode(self, ids, skip_special_tokens):
        names = {1000: "<think>", 1001: "</think>", 1002: "<end>"}
        kept = [i for i in ids if not (skip_special_tokens and i in self.all_special_ids)]
        return "".join(names.get(i) or chr(i) for i in kept)


@pytest.mark.parametrize("special", [True, False])
def test_a_thought_that_the_prompt_began_is_one(special):
    tokenizer = Tokenizer(special)
    asked, seven, answer_ = (list(map(ord, text)) for text in ("who?", "7", "12"))
    assert spoken(tokenizer, [*asked, 1000, 10], [*seven, 1001, *answer_]) == "12"
    assert spoken(tokenizer, [*asked, 1000, 10], seven) == "", "it was cut short within its thought"
    assert spoken(tokenizer, [*asked, 1000, 10, 1001], answer_) == "12", "a template may write an empty thought"
    assert spoken(tokenizer, asked, [1000, *seven, 1001, *answer_]) == "12"
    assert spoken(tokenizer, [1000, *asked], answer_) == "12", "the question speaks of the tag"


def test_what_is_graded_has_no_thoughts_and_the_text_keeps_them(tmp_path, made_up):  # noqa: F811
    made_up.answer = lambda batch: [Answer("<think>1", 3, 1.0, 0.5, SequenceStats(), 7.0, "2") for _ in batch.problems]
    (record,) = run(tmp_path, make_task(["a"]), plan_of(methods=["nabla"], n=[2], seeds=[0]))
    assert (record["answer"], record["right"], record["text"]) == ("2", True, "<think>1")
    assert "spoken" not in json.loads((tmp_path / runner.RESULTS).read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_of_each_answer_once_and_returns_the_same(loaded, method):  # noqa: F811
    heard = []
    few = batch(loaded, PROMPTS, 1 if method == "greedy" else 2)
    answers = METHODS[method](replace(few, on_answer=lambda i, answer: heard.append((i, answer))))
    assert sorted(i for i, _ in heard) == list(range(len(answers)))
    assert all(answers[i] is answer for i, answer in heard)
    assert all(answer.spoken == answer.text for answer in answers)
