"""Runs that are killed, cut short, continued, and asked to continue what is not theirs.

The methods are made up here: what is tested is the bookkeeping, thousands of times faster than models.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nabla_fast as nf
from nabla_fast.evaluation import runner, worker
from nabla_fast.evaluation.grading import GradingError
from nabla_fast.evaluation.journal import Journal, read_records
from nabla_fast.evaluation.methods import Answer
from nabla_fast.evaluation.records import key, latest
from nabla_fast.evaluation.runner import Arm, describe, evaluate, make_plan, open_run, pieces
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.rollout import ServerLostError
from nabla_fast.stats import SequenceStats

SOURCE = {"model": "a", "reward_model": "b"}


class Grader:
    """Right is an even digest; nothing is graded for problems named "ungradable"."""

    def check(self, problem_id, reference):
        if problem_id == "ungradable":
            raise GradingError("the reference answer '?' cannot be graded")

    def answer(self, problem_id, response):
        if problem_id == "ungraded":
            raise GradingError("score_answer failed")
        return response

    def same(self, one, other):
        return one == other

    def right(self, problem_id, reference, answer):
        return int(answer, 16) % 2 == 0


class FakeModels:
    def prompt_ids(self, problem):
        return tuple(problem.chat[0]["content"].encode())


def make_task(ids):
    problems = [Problem(name, ({"role": "user", "content": f"question {name}"},), "1") for name in ids]
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()
    return Task("made up", problems, Grader(), {"name": "made up", "problems": len(ids), "fingerprint": digest})


def answer(batch):
    """Every problem's answer is a digest of all that it may depend on."""
    if any("broken" in problem.id for problem in batch.problems):
        raise FloatingPointError("the model gave NaN")
    time.sleep(batch.delay)
    answers = []
    for problem, seed in zip(batch.problems, batch.seeds, strict=True):
        text = hashlib.sha256(f"{problem.id} {seed} {batch.n} {batch.method}".encode()).hexdigest()
        answers.append(Answer(text, 3, 1.0, 0.5, SequenceStats(rollouts=batch.n), 7.0))
    return answers


@pytest.fixture
def made_up(monkeypatch):
    """Sets the delay of each batch in seconds."""
    options = SimpleNamespace(delay=0.0, answer=answer)

    def method(name):
        return lambda batch: options.answer(SimpleNamespace(**vars(batch), method=name, delay=options.delay))

    def make_batch(models, problems, seeds, grader, config, n, size, on_answer, **more):
        return SimpleNamespace(problems=problems, seeds=seeds, n=n, size=size, on_answer=on_answer)

    monkeypatch.setattr(worker, "make_batch", make_batch)
    monkeypatch.setattr(worker, "METHODS", {name: method(name) for name in worker.METHODS})
    return options


def plan_of(methods=("greedy", "best-of-n", "nabla"), n=(2, 3), seeds=(0, 1), batch_size=4, **settings):
    return make_plan(methods, n, seeds, nf.NablaConfig(**settings), batch_size=batch_size)


def run(out, task, plan, **options):
    with open_run(out, describe(plan, task, SOURCE), plan.keys(task.problems)) as journal:
        return evaluate(FakeModels(), task, plan, journal, **options)


def by_key(records):
    found = {key(record): record for record in records}
    assert len(found) == len(records), "something was done twice"
    return found


def test_everything_is_done_once_and_in_one_line_each(tmp_path, made_up):
    task, plan = make_task(["a", "b", "c", "d", "e"]), plan_of()
    heard = []
    records = run(tmp_path, task, plan, on_record=heard.append)
    written = read_records(tmp_path / runner.RESULTS)
    assert written == heard == records
    assert set(by_key(written)) == set(plan.keys(task.problems))
    assert Counter(r["method"] for r in written) == {"greedy": 5, "best-of-n": 20, "nabla": 20}
    assert all(r["error"] is None and r["rollouts"] == r["n"] for r in written)
    assert run(tmp_path, task, plan, on_record=pytest.fail) == records


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path, made_up):
    task, plan = make_task([f"p{i}" for i in range(30)]), plan_of()
    expected = by_key(run(tmp_path / "whole", task, plan))
    made_up.delay = 0.004
    generator, kills = random.Random(0), 0
    out = tmp_path / "killed"
    for attempt in range(1000):
        # Nothing here uses torch, so a fork is safe.
        child = os.fork()
        if child == 0:
            try:
                run(out, task, plan)
            finally:
                os._exit(0)
        # Longer and longer, so that a slow disk gets to the end, too.
        time.sleep(generator.uniform(0.005, 0.05) * (1 + attempt / 20))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        kills += 1
    assert kills > 3
    assert by_key(read_records(out / runner.RESULTS)) == expected


@pytest.fixture
def finished(tmp_path, made_up):
    task, plan = make_task(["a", "b", "c"]), plan_of(seeds=(0,))
    run(tmp_path / "finished", task, plan)
    return SimpleNamespace(task=task, plan=plan, directory=tmp_path / "finished")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_anywhere_is_completed(tmp_path_factory, finished, data):
    whole = (finished.directory / runner.RESULTS).read_bytes()
    expected = by_key(read_records(finished.directory / runner.RESULTS))
    out = tmp_path_factory.mktemp("cut")
    shutil.copy(finished.directory / runner.CONFIG, out)
    cut = data.draw(st.integers(0, len(whole)))
    file = out / runner.RESULTS
    file.write_bytes(whole[:cut])
    assert by_key(run(out, finished.task, finished.plan)) == expected
    assert by_key(read_records(file)) == expected
    assert file.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1]), "a finished line was changed"


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    batch_size=st.integers(1, 6),
    n=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True),
    data=st.data(),
)
def test_batches_hold_what_is_left_once_and_no_prompt_twice(prompts, batch_size, n, seeds, data):
    problems = [Problem(str(i), ({"role": "user", "content": str(text)},), "1") for i, text in enumerate(prompts)]
    plan = plan_of(n=n, seeds=seeds, batch_size=batch_size)
    keys = plan.keys(problems)
    done = {k for k in keys if data.draw(st.booleans())}
    found = []
    for seed in plan.seeds:
        for piece in pieces(plan, seed, problems, done):
            arm, batch = piece.arm, piece.problems
            rows = len(batch) * (1 if arm.method == "nabla" else arm.n)
            assert rows <= batch_size or len(batch) == 1
            assert len({p.chat[0]["content"] for p in batch}) == len(batch)
            found += [(arm.method, arm.n, seed, p.id) for p in batch]
    assert sorted(found) == sorted(set(keys) - done)


def test_the_same_question_twice_gets_different_noise(tmp_path, made_up):
    problems = [Problem(name, ({"role": "user", "content": "same"},), "1") for name in ("a", "b")]
    task = Task("made up", problems, Grader(), {"name": "made up", "problems": 2, "fingerprint": "x"})
    seen = {}

    def remember(batch):
        seen.update(zip((p.id for p in batch.problems), batch.seeds, strict=True))
        return answer(batch)

    made_up.answer = remember
    run(tmp_path, task, plan_of(seeds=(0,)))
    assert seen["a"] != seen["b"]


def test_a_problem_that_fails_is_recorded_and_the_others_of_its_batch_are_not(tmp_path, made_up):
    task = make_task(["a", "broken", "ungradable", "ungraded", "b"])
    plan = plan_of(methods=["best-of-n"], n=[2], seeds=[0], batch_size=16)
    errors = {r["problem"]: r["error"] for r in run(tmp_path, task, plan)}
    assert errors == {
        "a": None,
        "broken": "FloatingPointError: the model gave NaN",
        "ungradable": "GradingError: the reference answer '?' cannot be graded",
        "ungraded": "GradingError: score_answer failed",
        "b": None,
    }
    told = {r["problem"]: r for r in read_records(tmp_path / runner.RESULTS)}
    assert told["ungraded"]["text"], "the answer is kept where only its grade is missing"
    assert told["broken"]["right"] is None


def test_failed_problems_are_tried_again_only_when_asked(tmp_path, made_up):
    task, plan = make_task(["a", "broken"]), plan_of(methods=["nabla"], n=[2], seeds=[0])
    run(tmp_path, task, plan)
    run(tmp_path, task, plan, on_record=pytest.fail)
    made_up.answer = lambda batch: [Answer("2", 1, None, None, SequenceStats(), 0.0) for _ in batch.problems]
    heard = []
    records = run(tmp_path, task, plan, retry_failed=True, on_record=heard.append)
    assert [r["problem"] for r in heard] == ["broken"]
    assert [r["error"] for r in records] == [None, None]
    assert len(read_records(tmp_path / runner.RESULTS)) == 3
    run(tmp_path, task, plan, retry_failed=True, on_record=pytest.fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ServerLostError])
def test_what_ends_a_run_leaves_what_can_be_continued_and_fails_no_problem(tmp_path, made_up, error):
    task, plan = make_task([str(i) for i in range(9)]), plan_of()
    expected = by_key(run(tmp_path / "whole", task, plan))
    left = [7]

    def interrupted(batch):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return answer(batch)

    made_up.answer = interrupted
    with pytest.raises(error):
        run(tmp_path / "stopped", task, plan)
    assert all(record["error"] is None for record in read_records(tmp_path / "stopped" / runner.RESULTS))
    made_up.answer = answer
    assert by_key(run(tmp_path / "stopped", task, plan)) == expected


def test_what_changes_no_answer_may_change(tmp_path, made_up):
    task = make_task(["a", "b"])
    run(tmp_path / "hf", task, plan_of())
    run(tmp_path / "hf", task, plan_of(draft_tokens=8, rollout_backend="hf"))
    run(tmp_path / "vllm", task, plan_of(vllm_url="http://127.0.0.1:1"))
    run(tmp_path / "vllm", task, plan_of(vllm_url="http://127.0.0.1:2", rollout_backend="vllm"))
    run(tmp_path / "vllm", task, plan_of(rollout_backend="vllm", vllm_gpu_memory_utilization=0.3))
    with pytest.raises(ValueError, match=r"settings.rollouts is new"):
        run(tmp_path / "hf", task, plan_of(vllm_url="http://127.0.0.1:1"))


def test_another_configuration_is_refused_and_nothing_is_overwritten(tmp_path, made_up):
    task, plan = make_task(["a", "b"]), plan_of()
    run(tmp_path, task, plan)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for other_task, other_plan, message in (
        (task, plan_of(n=(2, 4)), r"arms.best-of-n 3 is left out; .*arms.best-of-n 4 is new"),
        (task, plan_of(seeds=(0,)), r"seeds was \[0, 1\], is \[0\]"),
        (task, plan_of(learning_rate=0.5), r"settings.learning_rate was 0.01, is 0.5"),
        (task, plan_of(rollout=nf.Sampling(0.1)), r"settings.rollout.temperature was 0.6, is 0.1"),
        (make_task(["a"]), plan, r"task.problems was 2, is 1"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with other settings .*{message}"):
            run(tmp_path, other_task, other_plan)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_was_begun_under_an_old_name_of_its_pair_goes_on(tmp_path):
    task, plan = make_task(["a"]), plan_of()
    for pair in ("bundled", "arithmetic"):
        source = {"model": pair, "reward_model": pair}
        open_run(tmp_path, describe(plan, task, source), plan.keys(task.problems)).close()
    with pytest.raises(ValueError, match=r'models.model was "arithmetic", is "smollm2"'):
        open_run(tmp_path, describe(plan, task, {**source, "model": "smollm2"}), plan.keys(task.problems))


def test_a_directory_that_is_none_of_ours_is_refused(tmp_path, made_up):
    task, plan = make_task(["a"]), plan_of()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="a file; give a directory"):
        run(tmp_path / "file", task, plan)
    (tmp_path / runner.RESULTS).touch()
    with pytest.raises(ValueError, match=r"holds results.jsonl but no config.json"):
        run(tmp_path, task, plan)
    (tmp_path / runner.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        run(tmp_path, task, plan)


def test_a_line_that_is_no_result_is_named(tmp_path, made_up):
    task, plan = make_task(["a"]), plan_of()
    run(tmp_path, task, plan)
    file = tmp_path / runner.RESULTS
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"line 2 of .*results.jsonl is not JSON"):
        run(tmp_path, task, plan)


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    with Journal(tmp_path / "a.jsonl"), pytest.raises(BlockingIOError, match="another process is writing"):
        Journal(tmp_path / "a.jsonl")


def test_a_record_is_one_line_whatever_it_says(tmp_path):
    file = tmp_path / "a.jsonl"
    text = 'a\nb\u2028c "quoted" ∇\r\x00'
    with Journal(file) as journal:
        journal.append({"text": text})
        with pytest.raises(ValueError, match="JSON"):
            journal.append({"reward": float("nan")})
    assert file.read_bytes().count(b"\n") == 1
    assert read_records(file) == [{"text": text}]
    assert json.loads(file.read_text())["text"] == text


def test_the_last_of_several_records_counts():
    one = {"method": "nabla", "n": 2, "seed": 0, "problem": "a", "error": "x"}
    assert latest([one, {**one, "error": None}]) == [{**one, "error": None}]


def test_arms_of_a_plan():
    plan = plan_of(methods=["greedy", "nabla", "greedy"], n=[2, 4, 2])
    assert plan.arms == (Arm("greedy", 1), Arm("nabla", 2), Arm("nabla", 4))
    assert [arm.label for arm in plan.arms] == ["greedy", "nabla 2", "nabla 4"]
    assert plan.runs(0) == list(plan.arms)
    assert plan.runs(1) == list(plan.arms[1:])
    fixed = make_plan(["best-of-n", "nabla"], [2, 4], [0], nf.NablaConfig(), max_rollouts=5)
    assert fixed.arms == (Arm("best-of-n", 2), Arm("best-of-n", 4), Arm("nabla", 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["beam"]}, "--methods is beam; use some of greedy, self-consistency, best-of-n, nabla"),
        ({"methods": []}, "--methods is empty"),
        ({"n": [0]}, "--n is 0; give whole numbers of at least 1"),
        ({"n": []}, "--n is empty"),
        ({"seeds": []}, "--seeds is empty"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_a_mistake_in_a_plan_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**change)
