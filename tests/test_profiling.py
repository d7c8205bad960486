"""`nabla-fast generate --profile`: what it writes, and what it refuses."""

from __future__ import annotations

import gzip

import pytest
from tiny_models import tiny_language_model, tiny_reward_model, tiny_tokenizer
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli, profiling
from nabla_fast.stats import PHASES, STEPS, SequenceStats

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
    totals = SequenceStats()
    totals.seconds.update({"rollout": 3.0, "dto": 1.0})
    lines = profiling.phase_table(totals).splitlines()
    assert lines[1].split() == ["1", "roll", "out", "3.000", "75.0%"]
    assert lines[-1].split() == ["total", "4.000"]
    assert len(lines) == len(PHASES) + 2


def test_a_file_in_the_way_is_found_before_the_models_load(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_models", lambda *_: pytest.fail("the models were loaded"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        result = CliRunner().invoke(cli.app, ["generate", "--bundled", "--profile", str(path)])
        assert isinstance(result.exception, NotADirectoryError)
        assert "--profile" in str(result.exception)
