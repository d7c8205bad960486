"""Tasks and grading: where problems come from, what counts as right, and every mistake by name."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace

import pytest

from nabla_fast.evaluation.grading import GradingError, GymGrader, MathGrader
from nabla_fast.evaluation.tasks import PRESETS, load_task, parse_options


def write(tmp_path, *lines):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def mathematics():
    return MathGrader()


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("12", "so the answer is 12.", True),
        ("12", "3 times 4 = 12", True),
        ("12", "it is 13", False),
        ("1234", "the total is 1,234", True),
        (r"\frac{1}{2}", r"Thus $\boxed{0.5}$", True),
        (r"\frac{1}{2}", r"Thus $\boxed{\frac{2}{4}}$", True),
        (r"$\frac{1}{2}$", r"$x = \frac{1}{2}$", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        ("27.0", r"\boxed{27}", True),
        ("070", r"\boxed{70}", True),
        ("12", "no idea", False),
        ("12", "", False),
    ],
)
def test_mathematics_is_graded_by_math_verify(mathematics, reference, response, right):
    assert mathematics.right("p", reference, mathematics.answer("p", response)) is right


def test_equal_mathematics_is_one_vote(mathematics):
    half, other, third = (
        mathematics.answer("p", text) for text in (r"$\frac{1}{2}$", r"\boxed{0.5}", r"$\frac{1}{3}$")
    )
    assert mathematics.same(half, other)
    assert not mathematics.same(half, third)
    assert str(third) == r"\frac{1}{3}"
    assert mathematics.answer("p", "none") is None


def test_a_reference_that_holds_no_answer_cannot_be_graded(mathematics):
    with pytest.raises(GradingError, match=r"the reference answer '\$\$' cannot be graded"):
        mathematics.check("p", "$$")


def test_mathematics_is_graded_outside_the_main_thread(mathematics):
    found = []
    grade = lambda: found.append(mathematics.right("p", "4", mathematics.answer("p", "it is 4")))  # noqa: E731
    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert found == [True]


def test_reasoning_gym_tasks_take_their_own_parameters_and_grade_themselves():
    task = load_task("reasoning_gym:products", {"min_digits": 1, "max_digits": 1, "seed": 5}, max_problems=7)
    again = load_task("reasoning_gym:products", {"min_digits": 1, "max_digits": 1, "seed": 5}, max_problems=4)
    assert [p.id for p in task.problems] == [f"products/{i:04d}" for i in range(7)]
    assert again.problems == task.problems[:4]
    assert again.description["fingerprint"] != task.description["fingerprint"]
    assert task.description["options"] == {"seed": 5, "size": 500, "min_digits": 1, "max_digits": 1}
    problem = task.problems[0]
    assert problem.chat[0]["role"] == "user"
    assert "multiplication" in problem.chat[0]["content"]
    for response, right in ((f"6 * 9 gives {problem.reference}", True), ("it is 1000", False), ("none", False)):
        answer = task.grader.answer(problem.id, response)
        assert task.grader.right(problem.id, problem.reference, answer) is right


class Dataset:
    """Scores as reasoning-gym does, with part of the score for something."""

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.5 if answer else 0.0


def test_a_reasoning_gym_answer_is_tagged_or_a_number_or_the_whole_response():
    words = GymGrader(Dataset(), {"p": {"answer": "abc"}}, numbers=False)
    assert words.answer("p", "I think: <answer> abc </answer>, yes") == "abc"
    assert words.answer("p", " abc\n") == "abc"
    assert words.answer("p", " ") is None
    assert words.right("p", "abc", "abc")
    assert not words.right("p", "abc", "abd"), "part of the score is not right"
    numbers = GymGrader(Dataset(), {"p": {"answer": "54"}}, numbers=True)
    assert numbers.answer("p", "6 * 9 = 54.") == "54"
    assert numbers.answer("p", "<answer>so 54</answer> 7") == "54"
    assert numbers.answer("p", "none") is None
    assert not numbers.right("p", "54", None)
    assert numbers.same("54", "54.0")
    assert numbers.same("a  b", "a b")
    assert not numbers.same("a", "b")


def test_a_task_whose_answers_are_no_numbers_asks_for_a_tag():
    words = load_task("reasoning_gym:word_sorting", max_problems=2)
    assert all(p.chat[0]["content"].endswith("</answer> tags.") for p in words.problems)
    problem = words.problems[0]
    answer = words.grader.answer(problem.id, f"sorted: <answer>{problem.reference}</answer>")
    assert words.grader.right(problem.id, problem.reference, answer)
    numbers = load_task("reasoning_gym:gcd", max_problems=2)
    assert not any("<answer>" in p.chat[0]["content"] for p in numbers.problems)


def test_a_grader_that_fails_says_so():
    broken = SimpleNamespace(score_answer=lambda answer, entry: 1 / 0)
    with pytest.raises(GradingError, match="score_answer failed on '1': ZeroDivisionError"):
        GymGrader(broken, {"p": {"answer": "1"}}, numbers=True).right("p", "1", "1")


def test_options_are_literals_or_text():
    texts = ["min_digits=2", "allow_negation=true", "operators=['+', '-']", "word=ab c", "rate=0.5", "off=False"]
    assert parse_options(texts) == {
        "min_digits": 2,
        "allow_negation": True,
        "operators": ["+", "-"],
        "word": "ab c",
        "rate": 0.5,
        "off": False,
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["min_digits"], "'min_digits'; give NAME=VALUE"),
        (["=2"], "give NAME=VALUE"),
        (["a=1", "a=2"], "given twice"),
        *(([f"a={value}"], "the value must be finite, and plain data") for value in ("NaN", "[1e999]", "{1}", "b'a'")),
    ],
)
def test_an_option_that_cannot_be_read_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_options(texts)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nonsense", {}, "--task is 'nonsense'; use reasoning_gym:NAME, arithmetic, a .jsonl file, math500"),
        ("a/b/c", {}, "--task is 'a/b/c'"),
        ("reasoning_gym:product", {}, "reasoning-gym does not have; use one of products"),
        ("reasoning_gym:products", {"options": {"digits": 2}}, "--task-option is digits, .*max_digits"),
        ("reasoning_gym:products", {"options": {"min_digits": 9}}, "refuses .*min_digits=9.*max_digits must be"),
        ("reasoning_gym:products", {"options": {"min_digits": "x"}}, "refuses .*min_digits='x'"),
        ("reasoning_gym:gcd", {"options": {"size": 0}}, "has no problem with size=0; give at least 1"),
        ("reasoning_gym:products", {"split": "test"}, "--split is 'test', but reasoning_gym:products has no columns"),
        ("reasoning_gym:products", {"max_problems": 0}, "--max-problems is 0"),
        ("math500", {"options": {"a": 1}}, "--task-option is a, but only reasoning_gym:NAME tasks"),
        ("math500", {"prompt_column": "q"}, "--prompt-column is 'q', but math500 knows its columns"),
        ("owner/name", {}, "'owner/name', a hub data set; say with --prompt-column and --answer-column"),
        ("owner/name", {"prompt_column": "q"}, "say with --prompt-column and --answer-column"),
        ("none.jsonl", {}, "there is no file none.jsonl"),
    ],
)
def test_a_mistake_in_a_task_is_one_sentence(name, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_task(name, **arguments)


def test_a_file_gives_problems_with_stable_ids(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2"}]
    lines = ({"prompt": "3 times 4", "answer": 12}, "", {"prompt": chat, "answer": "4", "id": "sum"})
    task = load_task(write(tmp_path, *lines))
    assert [(p.id, p.reference) for p in task.problems] == [("line-00001", "12"), ("sum", "4")]
    assert task.problems[0].chat == ({"role": "user", "content": "3 times 4"},)
    assert task.problems[1].chat == tuple(chat)
    assert load_task(write(tmp_path, *lines), max_problems=1).problems == task.problems[:1]
    other = load_task(write(tmp_path, {"q": "x", "a": "1"}), prompt_column="q", answer_column="a")
    assert other.problems[0].reference == "1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (({"prompt": "x", "answer": "1"}, "{broken"), "line 2 of .*problems.jsonl is not JSON"),
        (({"prompt": "x"},), 'line 1 of .* has no "answer"; it has prompt'),
        (({"answer": "x"},), 'line 1 of .* has no "prompt"'),
        (("", "[1]"), 'line 2 of .* must be an object with "prompt" and "answer"'),
        (({"prompt": "", "answer": "1"},), "line 1 of .* has a prompt that cannot be used"),
        (({"prompt": 7, "answer": "1"},), "line 1 of .* has a prompt that cannot be used"),
        (({"prompt": "x", "answer": None},), "line 1 of .* has the answer None"),
        (('{"prompt": "x", "answer": NaN}',), "line 1 of .* has the answer nan; an answer is text or a finite number"),
        (('{"prompt": "x", "answer": 1e999}',), "line 1 of .* has the answer inf"),
        (({"prompt": "x", "answer": "1", "id": "a"}, {"prompt": "y", "answer": "1", "id": "a"}), 'the "id" a'),
        (("", ""), "holds no problem"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_task(write(tmp_path, *lines))


class HubRows(list):
    column_names = ("problem", "question", "answer")


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return HubRows({"problem": f"{i} + 1", "question": f"{i} + 1", "answer": str(i + 1)} for i in range(3))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_data_sets_by_preset_or_columns(hub):
    task = load_task("math500", max_problems=2)
    assert [p.id for p in task.problems] == ["math500/0000", "math500/0001"]
    assert task.problems[0].chat[0]["content"].startswith("0 + 1\n\nPlease reason step by step")
    assert task.problems[1].reference == "2"
    plain = load_task("owner/name", prompt_column="problem", answer_column="answer", split="train")
    assert plain.problems[0].chat[0]["content"] == "0 + 1"
    assert hub == [("HuggingFaceH4/MATH-500", "test"), ("owner/name", "train")]
    for preset in PRESETS:
        assert len(load_task(preset).problems) == 3


def test_an_unknown_column_is_named(hub):
    with pytest.raises(ValueError, match="--answer-column is 'solution'; owner/name has problem, question, answer"):
        load_task("owner/name", prompt_column="problem", answer_column="solution")


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("datasets", "math500", "math500 is on the hub, which needs datasets; run pip install"),
        ("reasoning_gym", "reasoning_gym:products", "needs reasoning-gym; run pip install"),
        ("math_verify", None, "grading mathematics needs math-verify; run pip install"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, tmp_path, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        load_task(name or write(tmp_path, {"prompt": "x", "answer": "1"}))


def test_arithmetic_has_500_held_out_problems_and_other_splits():
    task = load_task("arithmetic")
    assert len(task.problems) == len({p.chat[0]["content"] for p in task.problems}) == 500
    first = task.problems[0]
    expression = first.chat[0]["content"].removeprefix("Compute ").removesuffix(".")
    assert str(eval(expression)) == first.reference
    solution = f"whatever = 12\n\\boxed{{{first.reference}}}"
    assert task.grader.right(first.id, first.reference, task.grader.answer(first.id, solution))
    assert not task.grader.right(first.id, first.reference, task.grader.answer(first.id, "\\boxed{1000}"))
    assert load_task("arithmetic", max_problems=3).problems == task.problems[:3]
    tuning = load_task("arithmetic", split="tuning", max_problems=50)
    assert not {p.chat[0]["content"] for p in tuning.problems} & {p.chat[0]["content"] for p in task.problems}
    assert (
        load_task("arithmetic", {"seed": 1}, max_problems=3).description
        != load_task("arithmetic", max_problems=3).description
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "--split is 'dev'; arithmetic has train, validation, tuning, test"),
        ({"prompt_column": "a"}, "--prompt-column is 'a', but arithmetic has no columns; leave it out"),
        ({"options": {"size": 3}}, "--task-option is size, which arithmetic does not have; it has seed"),
        ({"options": {"seed": "x"}}, "--task-option: seed is 'x'; give a whole number"),
    ],
)
def test_what_arithmetic_does_not_have_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        load_task("arithmetic", **options)
