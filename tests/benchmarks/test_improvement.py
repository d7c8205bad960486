"""benchmarks/improvement.py: what it compares, and what stands in the table that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import improvement
import plots
import pytest
import tables

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["--before", "HEAD", "--after", "HEAD", "--suite", "operators", "--case", "token_diff"]

needs_git = pytest.mark.skipif(
    subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode != 0,
    reason="this is no git checkout",
)


def ran(commit, ours, theirs, clean=3):
    contenders = {
        tables.OURS: {"ours": True, "median_ms": ours, "clean": 3},
        "eager": {"ours": False, "median_ms": theirs, "clean": clean},
        "slow": {"ours": False, "median_ms": 9 * theirs, "clean": 3},
    }
    told = {"commit": commit, "machine": {"processor": "P"}, "versions": {"torch": "2"}, "threads": 2}
    return {**told, "records": [{"case": "sampling-8", "contenders": contenders}]}


@needs_git
def test_a_record_has_medians_over_turns_and_what_the_baseline_did_meanwhile():
    options = improvement.parse([*REQUIRED, "--what", "Less.", "--reason", "It sorted.", "--threads", "2"])
    runs = {
        "before": [ran("b", 40, 8), ran("b", 60, 12), ran("b", 41, 10)],
        "after": [ran("a", 5, 10), ran("a", 4, 8), ran("a", 9, 12)],
    }
    (one,) = improvement.entries(runs, options)
    assert one["before"] == {"commit": "b", "seconds": 0.041, "turns": [0.04, 0.06, 0.041]}
    assert (one["after"]["seconds"], one["ratio"], one["baseline_ratio"]) == (0.005, pytest.approx(8.2), 1.0)
    assert one["clean"]
    head = improvement.git("rev-parse", "--short", "HEAD")
    parsed = improvement.parse(one["command"].split()[2:])
    assert (parsed.before, parsed.after, parsed.case, parsed.threads) == (head, head, "token_diff", 2)
    runs["after"][1] = ran("a", 4, 8, clean=0)
    assert not improvement.entries(runs, options)[0]["clean"]


@needs_git
def test_the_table_has_the_newest_figures_of_a_change_and_no_quick_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    assert plots.improvements() == plots.NOT_MEASURED
    file = tmp_path / "improvements.json"
    runs = {"before": [ran("b", 40, 8)], "after": [ran("a", 5, 10)]}
    told = ["--what", "Less.", "--reason", "It sorted."]
    improvement.store(improvement.entries(runs, improvement.parse([*REQUIRED, *told, "--quick"])), file)
    assert plots.improvements() == plots.NOT_MEASURED
    improvement.store(improvement.entries(runs, improvement.parse([*REQUIRED, *told])), file)
    runs["after"] = [ran("a", 4, 8)]
    improvement.store(improvement.entries(runs, improvement.parse([*REQUIRED, *told])), file)
    assert len(json.loads(file.read_text())) == 1
    table = plots.improvements()
    assert "| Less. It sorted. | sampling-8 | b, a | 40 ms | 4 ms | 10 | 1 | P, 2 threads |" in table
    assert "python benchmarks/improvement.py --suite operators --case token_diff" in table


@needs_git
def test_the_package_of_a_worktree_is_what_is_measured(tmp_path):
    output = tmp_path / "out.json"
    trees = ["--before-tree", str(ROOT), "--after-tree", str(ROOT)]
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "improvement.py"),
        *REQUIRED,
        *trees,
        "--quick",
        "--turns",
        "1",
    ]
    command += ["--threads", "1", "--device", "cpu", "--what", "Nothing.", "--reason", "None.", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads(output.read_text())
    assert one["before"]["commit"] == one["after"]["commit"] == one["benchmarks"]
    assert one["before"]["seconds"] > 0
    assert one["quick"]


@needs_git
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--before", "no-such-commit"], "git rev-parse"),
        (["--before-tree", str(ROOT.parent / "nowhere")], "git rev-parse HEAD failed"),
        (["--before-tree", str(ROOT), "--after-tree", str(ROOT), "--case", "no such case"], "measured nothing"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, message, capsys):
    assert improvement.main([*REQUIRED, "--quick", "--turns", "1", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_git
def test_a_worktree_of_another_commit_is_refused(monkeypatch, tmp_path):
    heads = {improvement.HERE: "aaaaaaaaaaaa", ROOT: "bbbbbbbbbbbb"}
    monkeypatch.setattr(improvement, "git", lambda *_, where=improvement.HERE: heads[where])
    with (
        pytest.raises(ValueError, match="has bbbbbbb checked out, not HEAD, which is aaaaaaa"),
        improvement.built("HEAD", ROOT, tmp_path),
    ):
        pytest.fail("it was taken")


def test_a_change_needs_a_reason(capsys):
    with pytest.raises(SystemExit):
        improvement.parse([*REQUIRED, "--what", "Less."])
    assert "--what and --reason go together" in capsys.readouterr().err
