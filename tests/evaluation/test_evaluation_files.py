"""What stands in the directory of a run before it begins: links, results of others, lines that are none."""

from __future__ import annotations

import json
import os

import pytest
from test_evaluation_runner import made_up, make_task, plan_of, run  # noqa: F401

from nabla_fast.evaluation import journal as journal_module
from nabla_fast.evaluation import report, runner
from nabla_fast.evaluation.journal import Journal, read_records
from nabla_fast.evaluation.plots import FILES
from nabla_fast.whole_files import part_of, require_own_files, write_file, write_json


@pytest.fixture
def finished(tmp_path, made_up):  # noqa: F811
    """A finished run: its directory, its task and its plan."""
    task, plan = make_task(["a", "b"]), plan_of(seeds=(0,))
    out = tmp_path / "run"
    run(out, task, plan)
    return out, task, plan


@pytest.mark.parametrize(
    "name", [runner.CONFIG, runner.RESULTS, runner.SUMMARY, ".config.json.part", ".summary.json.part", *FILES]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_where_a_file_is_to_be_is_refused_and_not_followed(tmp_path, made_up, name, there):  # noqa: F811
    target = tmp_path / "precious"
    if there:
        target.write_text("precious")
    out = tmp_path / "run"
    out.mkdir()
    (out / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link to .*precious, and links are not written through"):
        run(out, make_task(["a"]), plan_of())
    assert target.exists() is there
    assert not there or target.read_text() == "precious"
    assert [file.name for file in out.iterdir()] == [name]


def test_a_link_that_comes_later_is_not_followed_either(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    part_of(tmp_path / "a.json").symlink_to(target)
    (tmp_path / "b.json").symlink_to(target)
    for file in ("a.json", "b.json"):
        with pytest.raises(ValueError, match="is a symbolic link"):
            write_json(tmp_path / file, {})
    with pytest.raises(ValueError, match="is a symbolic link"):
        Journal(tmp_path / "b.json")
    assert target.read_text() == "precious"


def test_the_system_refuses_a_link_that_appears_between_look_and_opening(tmp_path, monkeypatch):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "a.jsonl").symlink_to(target)
    monkeypatch.setattr(journal_module, "require_own_files", lambda files: None)
    with pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path / "a.jsonl")
    assert target.read_text() == "precious"


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            require_own_files([tmp_path / name])
    require_own_files([tmp_path / "none", tmp_path / "folder" / "none"])


def test_a_part_that_a_kill_left_is_in_nobodys_way(tmp_path):
    part_of(tmp_path / "a").write_text("half of")
    write_file(tmp_path / "a", b"all of it")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"all of it"]


def without(name):
    return lambda record: {key: value for key, value in record.items() if key != name}


def with_(**changes):
    return lambda record: {**record, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"foo": 1}, 'has no "method"'),
        (without("method"), 'has no "method"'),
        (without("n"), 'has no "n"'),
        (without("error"), 'has no "error"'),
        (without("right"), 'has no "right"'),
        (without("text"), 'has no "text"'),
        (without("rollouts"), 'has no "rollouts"'),
        (without("phases"), 'has no "phases"'),
        (with_(right=None), 'has neither an "error" nor a grade'),
        (with_(right="yes"), "has the \"right\" 'yes', which is not true, false or null"),
        (with_(seed=True), "has the \"seed\" 'True', which is not a whole number"),
        (with_(n="2"), "has the \"n\" '2', which is not a whole number"),
        (with_(problem=["a"]), r"has the \"problem\" .*, which is not text"),
        (with_(reward="high"), 'has the "reward"'),
        (with_(seconds=None), 'has the "seconds"'),
        (with_(rollouts=-1), "has the \"rollouts\" '-1', which is not a number of at least 0"),
        (with_(phases={"rollout": -1.0}), 'has the "phases"'),
        (with_(phases={"sleep": 1.0}), r'has the "phases" .* not seconds of rollout'),
        (with_(method="beam"), "is of beam .*, which is no part of this run"),
        (with_(n=99), "is of .* 99, seed 0, .*, which is no part of this run"),
        (with_(seed=7), "is of .*seed 7, .*, which is no part of this run"),
        (with_(problem="z"), "is of .*problem 'z', which is no part of this run"),
    ],
)
def test_a_line_of_another_program_is_named_and_the_file_stays(finished, change, message):
    out, task, plan = finished
    file = out / runner.RESULTS
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(change(json.loads(lines[1])))
    # An unfinished last line would be dropped from a file that is ours.
    file.write_text("\n".join(lines) + '\n{"unfinished')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"line 2 of .*results.jsonl {message}.* nothing was changed"):
        run(out, task, plan)
    assert file.read_bytes() == before


@pytest.mark.parametrize("line", ["[1]", "garbage", '{"n": NaN}', '{"n": Infinity}', "\xff", "[" * 10**5])
def test_a_line_that_is_no_json_object_is_named_and_the_file_stays(finished, line):
    out, task, plan = finished
    file = out / runner.RESULTS
    before = file.read_bytes() + line.encode("latin-1") + b"\n" + b"unfinished"
    file.write_bytes(before)
    number = before.count(b"\n")
    for read in (lambda: run(out, task, plan), lambda: report.compare(out, out)):
        with pytest.raises(ValueError, match=rf"line {number} of .*results.jsonl is not"):
            read()
    assert file.read_bytes() == before


def test_a_comparison_names_the_line_that_it_cannot_read(finished):
    out, *_ = finished
    file = out / runner.RESULTS
    first = json.loads(file.read_text().splitlines()[0])
    for change, message in ((without("tokens"), 'has no "tokens"'), (with_(method="beam"), "is of beam")):
        file.write_text(json.dumps(change(first)) + "\n")
        with pytest.raises(ValueError, match=rf"line 1 of .*results.jsonl {message}"):
            report.compare(out, out)


@pytest.mark.parametrize(
    "change", [without("task"), without("arms"), without("seeds"), with_(task="x"), with_(arms=[])]
)
def test_a_configuration_of_another_program_is_named(finished, change):
    out, *_ = finished
    config = json.loads((out / runner.CONFIG).read_text())
    (out / runner.CONFIG).write_text(json.dumps(change(config)))
    with pytest.raises(ValueError, match=r"holds a config.json that nabla-fast eval did not write"):
        report.compare(out, out)


def test_results_that_carry_more_than_is_needed_are_read(finished):
    out, task, plan = finished
    file = out / runner.RESULTS
    lines = [json.dumps({**json.loads(line), "note": "mine"}) for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines) + "\n")
    assert all(record["note"] == "mine" for record in run(out, task, plan))


def test_half_a_surrogate_pair_comes_back_as_it_was(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append({"text": "a\ud800b"})
    (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert read_records(tmp_path / "a.jsonl") == [{"text": "a\ud800b"}]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append({"n": 1})
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"a.jsonl cannot be written to \(No space left on device\)"):
            journal.append({"n": 2})
    assert journal.records == [{"n": 1}]
