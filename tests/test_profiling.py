"""`--profile` of `nabla-fast generate` and `nabla-fast eval`: what it writes, and what it refuses."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli, profiling
from nabla_fast.cli.models import ModelChoice
from nabla_fast.evaluation import runner
from nabla_fast.stats import PHASES, STEPS
from nabla_fast.testing.models import save_pair, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_profile_names_the_phases(tmp_path):
    tokenizer = tiny_tokenizer()
    models = tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer
    config = nf.NablaConfig(max_new_tokens=4, max_rollouts=2, max_iters=2, gradient_threshold=None)
    directory = tmp_path / "new" / "profile"
    profiling.prepare(directory)
    output = profiling.profile(directory, nf.generate, *models, "is it on", config)
    assert output.texts == nf.generate(*models, "is it on", config).texts
    trace = gzip.decompress((directory / profiling.TRACE).read_bytes()).decode()
    phases = (directory / profiling.PHASE_TABLE).read_text()
    for phase, step in STEPS.items():
        if output.stats.totals.seconds[phase]:
            assert f'"{step}"' in trace
        assert step in phases
    assert "aten::" in (directory / profiling.OPERATOR_TABLE).read_text()


def test_the_table_adds_up():
    seconds = dict.fromkeys(PHASES, 0.0) | {"rollout": 3.0, "dto": 1.0}
    lines = profiling.phase_table(seconds).splitlines()
    assert lines[1].split() == ["1", "roll", "out", "3.000", "75.0%"]
    assert lines[-1].split() == ["total", "4.000"]
    assert len(lines) == len(PHASES) + 2


def test_a_file_in_the_way_is_found_before_the_models_load(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelChoice, "load", lambda _: pytest.fail("the models were loaded"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/x", tmp_path / ("x" * 300)):
        result = CliRunner().invoke(cli.app, ["generate", "--pair=arithmetic", "--profile", str(path)])
        assert isinstance(result.exception, OSError)
        assert "--profile" in str(result.exception)


@pytest.mark.parametrize("name", [profiling.TRACE, profiling.PHASE_TABLE, profiling.OPERATOR_TABLE])
def test_a_link_where_a_profile_is_to_be_is_refused_and_not_followed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ModelChoice, "load", lambda _: pytest.fail("the models were loaded"))
    target = tmp_path / "precious"
    target.write_text("precious")
    for link in (name, f".{name}.part"):
        profile = tmp_path / link.strip(".")
        profile.mkdir()
        (profile / link).symlink_to(target)
        for command in (["generate"], ["eval", "--out", str(tmp_path / "run")]):
            result = CliRunner().invoke(cli.app, [*command, "--pair=arithmetic", "--profile", str(profile)])
            assert isinstance(result.exception, ValueError)
            assert "is a symbolic link to" in str(result.exception)
    # One that comes while the models decode.
    late = tmp_path / "late"
    profiling.prepare(late)
    (late / name).symlink_to(target)
    with pytest.raises(ValueError, match="is a symbolic link to"):
        profiling.profile(late, lambda: nf.NablaOutput([], [], [], nf.Stats([])))
    assert target.read_text() == "precious"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Options of a small evaluation of three problems."""
    home = tmp_path_factory.mktemp("evaluation")
    model, reward_model = save_pair(home, dtype=torch.float64)
    task = home / "sums.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"what is {i} + 2", "answer": i + 2}) + "\n" for i in range(3)))
    fast = ("--max-new-tokens", "5", "--max-iters", "2", "--gradient-threshold", "none", "--dtype", "float64")
    models = ("--model", str(model), "--reward-model", str(reward_model))
    return ["eval", "--task", str(task), "--methods", "greedy,best-of-n,nabla", "--n", "3,2", *models, *fast]


def answers(directory):
    lines = (directory / runner.RESULTS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "phases")} for line in lines]


def test_an_evaluation_is_profiled_apart_from_its_results(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PROFILED_TOKENS", 3)
    traced = []
    original = runner.Worker.run

    def run(worker, piece, tell):
        if torch.autograd._profiler_enabled():
            problems, tokens = [problem.id for problem in piece.problems], worker._plan.config.max_new_tokens
            traced.append((piece.arm.label, problems, tokens))
        return original(worker, piece, tell)

    monkeypatch.setattr(runner.Worker, "run", run)
    for name, profile in (("plain", []), ("profiled", ["--profile", str(tmp_path / "profile")])):
        result = CliRunner().invoke(cli.app, [*evaluation, "--out", str(tmp_path / name), *profile])
        assert result.exit_code == 0, result.output
    assert answers(tmp_path / "profiled") == answers(tmp_path / "plain")
    first = [record["problem"] for record in answers(tmp_path / "plain")][: runner.PROFILED_PROBLEMS]
    assert traced
    assert {label for label, _, _ in traced} == {"greedy", "best-of-n 2", "nabla 2"}
    assert {problem for _, problems, _ in traced for problem in problems} == set(first)
    assert {tokens for _, _, tokens in traced} == {3}
    trace = gzip.decompress((tmp_path / "profile" / profiling.TRACE).read_bytes()).decode()
    for name in ("greedy", "best-of-n 2", "nabla 2", STEPS["rollout"], STEPS["gradient"]):
        assert f'"{name}"' in trace
    phases = (tmp_path / "profile" / profiling.PHASE_TABLE).read_text()
    for label in ("greedy", "best-of-n 2", "best-of-n 3", "nabla 2", "nabla 3"):
        assert f"{label}\nphase" in phases
    assert "aten::" in (tmp_path / "profile" / profiling.OPERATOR_TABLE).read_text()


def test_seconds_of_an_evaluation_add_up_by_method():
    def record(method, n, **seconds):
        return {"method": method, "n": n, "phases": dict.fromkeys(PHASES, 0.0) | seconds}

    failed = {"method": "nabla", "n": 2, "error": "out of memory"}
    some = [record("greedy", 1, rollout=1.0), record("nabla", 2, dto=2.0), record("greedy", 1, rollout=3.0), failed]
    greedy, nabla = runner.phase_tables(some).split("\n\n")
    assert greedy.splitlines()[0] == "greedy"
    assert greedy.splitlines()[-1].split() == ["total", "4.000"]
    assert nabla.splitlines()[0] == "nabla 2"
    assert nabla.splitlines()[-1].split() == ["total", "2.000"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--profile", "FILE"], NotADirectoryError, "--profile"),
        (["--profile", "new", "--engine", "ray"], ValueError, "--profile is new, but --engine is ray"),
    ],
)
def test_an_evaluation_that_cannot_be_profiled_is_refused(evaluation, tmp_path, monkeypatch, options, error, message):
    monkeypatch.setattr(runner, "open_run", lambda *_: pytest.fail("a run was begun"))
    (tmp_path / "file").write_text("")
    given = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    result = CliRunner().invoke(cli.app, [*evaluation, "--out", str(tmp_path / "out"), *given])
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)


def test_help_says_how_much_of_an_evaluation_is_traced():
    shown = " ".join(CliRunner().invoke(cli.app, ["eval", "--help"], env={"COLUMNS": "200"}).output.split())
    assert f"first {runner.PROFILED_PROBLEMS} problems" in shown
    assert f"{runner.PROFILED_TOKENS} tokens at most" in shown
