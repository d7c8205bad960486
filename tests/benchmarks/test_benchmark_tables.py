"""Tables and pictures of the benchmarks say what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pictures
import plots
import pytest
import tables
from rich.console import Console


def contender(taken: float, ours: bool, **figures):
    told = {"ours": ours, "median_ms": taken * 1e3, "over_floor": 1.5, "peak_bytes": 2**20, "clean": 5, "repeats": 5}
    return told | figures


def operator(seconds: float, **changed):
    contenders = {"native": contender(seconds, True), "eager": contender(4 * seconds, False, peak_bytes=2**22)}
    record = {"case": "a", "suite": "operators", "name": "relaxed_stats", "model": "M", "dtype": "float32"}
    record |= {"shape": {"N": 2, "V": 9}, "floor": {"bound": "memory"}, "contenders": contenders} | changed
    return record


def side(suite: str, seconds: float, **variants: float):
    """``variants`` are seconds of contenders, by constants' names in `tables`."""
    phases = {"dto": seconds / 4, "gradient": seconds / 2}
    common = {"gradient_evaluations": 3, "host_waits": None, "error": 0.0, "seconds": phases}
    contenders = {
        tables.OURS: contender(seconds, True, **common),
        **{getattr(tables, name): contender(own, True, **common) for name, own in variants.items()},
        "published": contender(9 * seconds, False, **common | {"gradient_evaluations": 7, "peak_bytes": 2**23}),
    }
    return operator(0, case=suite, suite=suite, name=suite, shape={"m": 64}, floor=None, contenders=contenders)


def result(started: str, *records, quick: bool = False, **gpu):
    return {
        "format": tables.FORMAT,
        "started": started,
        "quick": quick,
        "commit": "abc",
        "threads": 2,
        "machine": {"processor": "P", **gpu},
        "versions": {"torch": "2"},
        "records": [*records, {"case": "b", "suite": None, "error": "out of memory"}],
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "case_names", lambda kind, suite: {})
    (tmp_path / "p").mkdir()
    for name, one in {
        "2026-01-02.json": result("2026-01-02", operator(0.002)),
        "2026-01-01.json": result("2026-01-01", operator(0.001)),
        "2026-01-03-quick.json": result("2026-01-03", operator(0.003), quick=True),
    }.items():
        (tmp_path / "p" / name).write_text(json.dumps(one))
    return tmp_path


def add(results: Path, *records):
    (results / "p" / "more.json").write_text(json.dumps(result("2026-01-04", *records)))


def test_tables_are_filled_with_the_newest_full_run(results):
    text = "before <!-- results: cpu operators -->old<!-- end --> <!-- results: gpu operators --><!-- end --> after"
    filled = plots.filled(text)
    assert "| case | ours | time | time/floor | × eager | memory |" in filled
    assert "| relaxed_stats · M float32 · N 2, V 9 | native | 2 ms | 1.50 | 4 | 0.25 |" in filled
    assert "old" not in filled
    assert filled.startswith("before <!--")
    assert "<!-- results: gpu operators -->\n\nnot measured\n\n<!-- end --> after" in filled
    assert plots.filled(filled) == filled


def test_the_brief_table_names_what_was_not_measured(results, monkeypatch):
    monkeypatch.setattr(plots, "BRIEF", {"cpu": ("dto",), "gpu": ("generate",)})
    add(results, side("dto", 1.0))
    assert plots.speed_in_brief().splitlines()[2:] == [
        "| dto (m 64) | M float32 | P, 2 threads | 1 s | 9 s | 9 | 12 % |",
        "| generate |  | gpu | not measured | not measured | not measured | not measured |",
    ]


def test_a_table_of_whole_runs_has_the_variants_that_were_measured(results):
    assert plots.section("cpu", "dto") == plots.section("cpu", "generate") == plots.NOT_MEASURED
    add(results, side("dto", 1.0, CHECKPOINTED=2.0), side("generate", 2.0, NO_CACHE=0.5))
    dto = plots.section("cpu", "dto").splitlines()
    assert [cell.strip() for cell in dto[2].strip("|").split("|")] == [
        *("case", "nabla_fast", "published", "times faster", "memory", "checkpointed: time", "memory of that"),
        *("gradients", "difference"),
    ]
    assert dto[-1] == "| dto · M float32 · m 64 | 1 s | 9 s | 9 | 0.12 | 2 s | 0.12 | 3, 7 | 0 |"
    generate = plots.section("cpu", "generate")
    # The variant counts as one even where it was faster.
    assert "| generate · M float32 · m 64 | 2 s | 500 ms | 18 s | 9 | 0.12 | 3, 7 | 0 |" in generate
    assert "(assets/speed/p/phases.png)" in generate
    assert "`benchmarks/results/p/more.json`" in generate


def test_cases_that_were_not_measured_are_named(results, monkeypatch):
    monkeypatch.setattr(
        plots, "case_names", lambda kind, suite: {"x": [f"{kind} {suite}", "a", "b"], "y": ["c", "d"], "z": []}
    )
    missing = "Not measured there: `cpu operators`, `b`, all of `y`."  # b failed
    assert plots.section("cpu", "operators").split("\n\n")[2] == missing
    assert plots.section("gpu", "operators") == plots.NOT_MEASURED


def test_the_cases_of_a_gpu_are_known_without_one():
    assert plots.case_names("gpu", "generate") == {"generate": [f"generate-batch-{n}" for n in (1, 4, 16)]}


def test_a_gpu_has_tables_of_its_own(results):
    (results / "g").mkdir()
    (results / "g" / "x.json").write_text(json.dumps(result("2026-01-04", operator(0.004), gpu={"name": "GPU 1"})))
    assert "4 ms" in plots.section("gpu", "operators")
    assert "GPU 1" in plots.section("gpu", "operators")
    assert "4 ms" not in plots.section("cpu", "operators")


@pytest.mark.parametrize("which", ["tpu operators", "cpu speed", "cpu", "improvements in brief", "quality chess"])
def test_a_marker_of_an_unknown_table_is_refused(results, which):
    with pytest.raises(ValueError, match="must name one of"):
        plots.filled(f"<!-- results: {which} --><!-- end -->")


def test_pictures_are_drawn(results):
    add(results, side("generate", 2.0, NO_CACHE=0.5))
    records = plots.newest_records(plots.runs(results / "p"))
    drawn = pictures.draw("p", records, results / "p")
    assert [path.name for path in drawn] == [f"{n}.png" for n in (*pictures.PICTURES, pictures.DECODE_PICTURE)]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_the_phases_of_a_decode_add_up_to_its_time():
    decode = side("generate", 2.0)["contenders"][tables.OURS]
    assert pictures.phases(decode) == {"dto": 0.5, "gradient": 1.0, "other": 0.5}


def test_check_tells_a_table_that_is_not_what_the_results_say(results, monkeypatch, capsys):
    monkeypatch.setattr(plots, "DOCS", results)
    monkeypatch.setattr(plots, "PICTURES", results / "pictures")
    document = results / "README.md"
    document.write_text("<!-- results: cpu operators --><!-- end -->\n<!-- results: improvements --><!-- end -->")
    monkeypatch.setattr(plots, "DOCUMENTS", (document,))
    assert plots.main(["--check"]) == 1
    assert str(document) in capsys.readouterr().out
    assert plots.main([]) == 0
    assert "`benchmarks/results/p/2026-01-02.json`" in document.read_text()
    assert plots.main(["--check"]) == 0
    add(results, operator(0.004))
    assert plots.main(["--check"]) == 1


def test_the_documents_say_what_the_results_say():
    assert list(plots.outdated()) == [], "run python benchmarks/plots.py"


def test_every_table_stands_once():
    text = "".join(document.read_text() for document in plots.DOCUMENTS)
    suites = [f"{kind} {suite}" for kind in plots.KINDS for suite in plots.SUITES]
    others = [plots.IMPROVEMENTS, plots.SPEED_IN_BRIEF, plots.QUALITY_IN_BRIEF, "quality arithmetic"]
    for which in (*suites, *others):
        assert text.count(f"<!-- results: {which} -->") == 1, which


def test_a_disturbed_case_has_a_star():
    record = operator(0.001)
    assert "*" not in "".join(tables.operator_cells(record))
    record["contenders"]["eager"]["clean"] = 0
    assert tables.operator_cells(record)[3] == "1.50 *"


def test_what_the_gpu_script_left_is_one_table(tmp_path):
    (tmp_path / "operators.json").write_text(json.dumps(result("x", operator(0.002))))
    (tmp_path / "status.tsv").write_text("build\tok\t93\nsanitize\tfailed, exit status 1\t40\n")
    console = Console(width=120, record=True)
    console.print(tables.overview(tmp_path))
    shown = " ".join(console.export_text().split())
    for expected in ("native │ 2 ms │ 1.50 │ 4 │ 0.25", "out of memory", "build │ ok │ 93 s", "failed, exit status 1"):
        assert expected in shown
