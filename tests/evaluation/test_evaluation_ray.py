"""Evaluations on a Ray cluster, whose workers are killed. The cluster is one of this machine's own."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pytest
from test_evaluation_cli import FAST, invoke, lines, pair, problems  # noqa: F401

import nabla_fast as nf
from nabla_fast.evaluation import ray_engine
from nabla_fast.evaluation.journal import read_records
from nabla_fast.evaluation.ray_engine import Cluster, WorkerLostError, evaluate
from nabla_fast.evaluation.records import key
from nabla_fast.evaluation.runner import RESULTS, describe, make_plan, open_run
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.sampling import sequence_seeds

ray = pytest.importorskip("ray", reason="ray is not installed; the local engine has tests of its own")
psutil = pytest.importorskip("psutil", reason="psutil, which comes with ray, is not installed")

TWO = Cluster(workers=2, cpus_per_worker=1)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # As Ray has it, its workers give way to whatever else runs, and other tests do: 12 seconds became 146.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (it is Ray that spells it so)
    # The workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Grader:
    def check(self, problem_id, reference):
        pass

    def answer(self, problem_id, response):
        return response

    def same(self, one, other):
        return one == other

    def right(self, problem_id, reference, answer):
        return answer.startswith(problem_id)


class FakeModels:
    def prompt_ids(self, problem):
        return tuple(problem.chat[0]["content"].encode())


def load(deadly=(), endless=()):
    """Models whose methods write down problem and noise, die of some problems and never finish others.

    Patched in the worker's process.
    """
    import os
    import time
    from types import SimpleNamespace

    from nabla_fast.evaluation import worker
    from nabla_fast.evaluation.methods import Answer
    from nabla_fast.stats import SequenceStats

    def make_batch(models, asked, seeds, grader, config, n, size, on_answer, **more):
        return SimpleNamespace(problems=asked, seeds=seeds, n=n, on_answer=on_answer)

    def method(batch):
        time.sleep(0.02)
        answers = []
        for i, (problem, seed) in enumerate(zip(batch.problems, batch.seeds, strict=True)):
            if problem.id in deadly:
                time.sleep(0.3)  # until what was told is on its way
                os._exit(1)
            if problem.id in endless:
                time.sleep(1e6)
            answers.append(Answer(f"{problem.id} {seed} {batch.n}", 3, 1.0, 0.5, SequenceStats(), 7.0))
            batch.on_answer(i, answers[-1])
        return answers

    worker.make_batch = make_batch
    worker.METHODS = dict.fromkeys(worker.METHODS, method)
    return FakeModels()


def unloadable():
    raise FileNotFoundError("there is no model at /nowhere")


def made_up(count):
    asked = [Problem(f"p{i}", ({"role": "user", "content": f"question {i}"},), "1") for i in range(count)]
    return Task("made up", asked, Grader(), {"name": "made up", "problems": count, "fingerprint": "x"})


def run(out, task, how, seeds=(0,), methods=("best-of-n", "nabla"), **options):
    plan = make_plan(methods, [2], seeds, nf.NablaConfig(), batch_size=4)
    with open_run(out, describe(plan, task, {"model": "a"}), plan.keys(task.problems)) as journal:
        return evaluate(how, task, plan, journal, TWO, **options)


def workers():
    return [child for child in psutil.Process().children(recursive=True) if "_Actor" in " ".join(child.cmdline())]


def test_a_killed_worker_is_replaced_and_its_problems_are_run_again(tmp_path):
    task = made_up(40)
    heard, killed = [], set()

    def on_record(record):
        heard.append(record)
        if len(heard) in (5, 60):
            victim = workers()[0]
            killed.add(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    records = run(tmp_path, task, load, (0, 1), on_record=on_record)
    assert len(killed) == 2
    written = read_records(tmp_path / RESULTS)
    assert sorted(map(key, written)) == sorted(map(key, records))
    assert len(written) == len(heard) == 160
    assert len({key(record) for record in written}) == 160, "something was done twice"
    assert all(record["right"] for record in records)
    # The noise is a problem's own, whoever runs it and beside whom.
    prompts = [FakeModels().prompt_ids(problem) for problem in task.problems]
    for seed in (0, 1):
        noise = dict(zip((p.id for p in task.problems), sequence_seeds(seed, prompts), strict=True))
        for r in records:
            assert r["seed"] != seed or r["text"] == f"{r['problem']} {noise[r['problem']]} {r['n']}"
    assert run(tmp_path, task, unloadable, (0, 1), on_record=pytest.fail) is not None, "nothing was left to do"


def test_an_answer_is_on_the_disk_while_others_of_its_piece_are_under_way(tmp_path):
    class KilledError(Exception):
        pass

    def on_record(record):
        written = read_records(tmp_path / RESULTS)
        assert key(written[-1]) == key(record), "heard of before it was on the disk"
        if len(written) == 4:
            raise KilledError  # what a kill would be

    # Two pieces of four problems, of which the last one never comes.
    with pytest.raises(KilledError):
        run(tmp_path, made_up(8), partial(load, endless=("p2", "p6")), methods=["nabla"], on_record=on_record)
    assert sorted(r["problem"] for r in read_records(tmp_path / RESULTS)) == ["p0", "p1", "p4", "p5"]
    records = run(tmp_path, made_up(8), load, methods=["nabla"])
    assert len(records) == len(read_records(tmp_path / RESULTS)) == 8


def test_what_a_worker_told_before_it_died_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_DEATHS_OF_A_PIECE", 1)
    records = run(tmp_path, made_up(4), partial(load, ("p3",)), methods=["nabla"])
    written = read_records(tmp_path / RESULTS)
    assert sorted(r["problem"] for r in written) == ["p0", "p1", "p2", "p3"]
    assert [r["problem"] for r in records if r["error"]] == ["p3"]
    assert "1 workers died on it" in written[-1]["error"], "not taken for the culprit before it was alone"


def test_a_problem_that_kills_its_workers_is_recorded_as_failed_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_DEATHS_OF_A_PIECE", 2)
    records = run(tmp_path, made_up(6), partial(load, ("p2",)), methods=["nabla"])
    assert len(records) == 6
    for record in records:
        if record["problem"] == "p2":
            assert record["error"].startswith("WorkerLostError: 2 workers died on it; ")
        else:
            assert record["right"], record["error"]


def test_workers_that_only_ever_die_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_DEATHS_OF_A_PIECE", 2)
    monkeypatch.setattr(ray_engine, "_PROBLEMS_IN_A_ROW", 1)
    with pytest.raises(WorkerLostError, match="workers die one after the other"):
        run(tmp_path, made_up(6), partial(load, tuple(f"p{i}" for i in range(6))), methods=["nabla"])
    assert read_records(tmp_path / RESULTS) == []


def test_models_that_do_not_load_are_an_error_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="cannot load the models: FileNotFoundError: there is no model at /nowhere"):
        run(tmp_path, made_up(2), unloadable)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(workers=0), "--workers is 0; give at least 1"),
        (Cluster(workers=3, cpus_per_worker=1), "--workers is 3, and the cluster has room for 2; give fewer"),
        (Cluster(cpus_per_worker=0), "--cpus-per-worker is 0; give at least 1"),
        (Cluster(cpus_per_worker=3), "--cpus-per-worker is 3, and the cluster has 2 CPU cores; give fewer"),
        (Cluster(gpu=True), "--device is cuda, and the cluster has no GPU; use --device cpu"),
    ],
)
def test_a_cluster_without_room_is_an_error(cluster, message, tmp_path):
    task, plan = made_up(1), make_plan(["greedy"], [1], [0], nf.NablaConfig())
    journal = open_run(tmp_path, describe(plan, task, {}), plan.keys(task.problems))
    with journal, pytest.raises(ValueError, match=message):
        evaluate(load, task, plan, journal, cluster)


def test_two_workers_give_the_answers_of_one_process_line_by_line(pair, problems, tmp_path):  # noqa: F811
    command = ("--task", problems, "--n", "2", "--seeds", "0,1", "--batch-size", "4", *pair, *FAST, "--json")
    local = invoke(*command, "--out", tmp_path / "local")
    assert local.exit_code == 0, local.output
    spread = invoke(*command, "--out", tmp_path / "ray", "--engine", "ray", "--workers", 2, "--cpus-per-worker", 1)
    assert spread.exit_code == 0, spread.output
    assert lines(tmp_path / "ray") == lines(tmp_path / "local")
