"""What the command line prints in terminals of any width, and what it leaves out."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from nabla_fast import cli
from nabla_fast.cli import console
from nabla_fast.cli.models import PAIR_NAMES
from nabla_fast.demo.pairs import PAIRS

COLUMNS = ("method", "accuracy", "reward\nbefore", "why")
ROWS = [("greedy", "61.5%", "-12.345", "no reason that is short"), ("self-consistency 16", "100.0%", Text("-0.1"), "")]


def table(width):
    screen = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    console.print_table("a title of some words", COLUMNS, ROWS, text=["why"], console=screen)
    return screen.file.getvalue()


def test_a_table_that_fits_is_one():
    lines = table(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("61.5%" in line and "-12.345" in line for line in lines)


def test_a_table_fits_exactly_where_it_is_no_wider():
    least = next(width for width in range(200) if "─" in table(width))
    lines = table(least).splitlines()
    assert max(map(len, lines)) <= least
    assert any("61.5%" in line and "-12.345" in line for line in lines)


@pytest.mark.parametrize("width", [5, 20, 40])
def test_a_table_that_does_not_fit_has_a_cell_a_line_and_all_of_each(width):
    told = table(width)
    for cell in ("accuracy 61.5%", "accuracy 100.0%", "reward before -12.345", "why no reason that is short"):
        assert f"  {cell}\n" in told
    assert "method self-consistency 16\n" in told
    assert "…" not in told


def test_a_thing_is_counted_in_the_plural_unless_there_is_one():
    assert [console.counted(n, "rollout") for n in (0, 1, 2)] == ["0 rollouts", "1 rollout", "2 rollouts"]


def test_what_libraries_tell_programmers_is_not_shown(capsys):
    with console.shown_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit("foreign", FutureWarning, "/lib/transformers/a.py", 1)
        warnings.warn_explicit("memory is short", UserWarning, "/lib/torch/a.py", 1)
        warnings.warn_explicit("ours", FutureWarning, console.__file__, 1)
    assert capsys.readouterr().err == "warning: memory is short\nwarning: ours\n"


@pytest.mark.parametrize("arguments", ["generate --pair arithmetic", "--version"])
def test_a_closed_standard_output_is_an_error(arguments):
    script = f"{sys.executable} -m nabla_fast {arguments} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; use >/dev/null to print nothing\n"


def test_every_pair_has_its_name_among_the_options():
    assert tuple(PAIRS) == PAIR_NAMES


@pytest.mark.parametrize(("old", "new"), [("--demo", "smollm2"), ("--bundled", "arithmetic")])
def test_the_old_names_of_pairs_work_with_a_warning(old, new, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr("nabla_fast.cli.models.ModelChoice.load", lambda choice: chosen.append(choice.pair) or 1 / 0)
    CliRunner().invoke(cli.app, ["generate", old])
    assert chosen == [new]
    told = f"warning: {old} is deprecated and will be removed in the next release; use --pair {new}\n"
    done = CliRunner().invoke(cli.app, ["eval", old, "--out", "/proc/x", "--task", "arithmetic"])
    assert told in done.stderr
    for command in ("generate", "eval"):
        shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        assert old not in shown
        assert "smollm2|arithmetic" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--pair", "other"], "--pair is 'other'; use smollm2 or arithmetic"),
        (["generate", "--pair", "arithmetic", "--prompt", "What is 6 * 9?"], "was not trained for 'What is 6 * 9?'"),
        (["eval", "--pair", "arithmetic", "--task", "{task}", "--out", "{out}"], "was not trained for 'is it on'"),
        (["generate", "--pair", "arithmetic", "--demo"], "--pair is arithmetic and smollm2; give one of them"),
    ],
)
def test_a_pair_refuses_what_it_is_not_for(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("nabla_fast.cli.models.ModelChoice.load", lambda _: pytest.fail("loaded"))
    (tmp_path / "task.jsonl").write_text('{"prompt": "is it on", "answer": "yes"}\n')
    places = {"task": tmp_path / "task.jsonl", "out": tmp_path / "run"}
    done = CliRunner().invoke(cli.app, [part.format(**places) for part in arguments])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
    assert not (tmp_path / "run").exists()
