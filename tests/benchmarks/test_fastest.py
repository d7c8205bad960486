"""The table of measured back ends that ships with the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fastest  # noqa: E402

from nabla_fast.ops import measured  # noqa: E402


def run(started, milliseconds, *, kernels=None, gpu="GPU A", suite="operators"):
    """A result of one case, from model and back end to milliseconds."""
    records = [
        {
            "suite": suite, "name": "dto_step, one latents row", "model": model,
            "contenders": {name: {"median_ms": ms} for name, ms in by.items()},
        }
        for model, by in milliseconds.items()
    ]  # fmt: skip
    versions = {} if kernels is None else {"kernels": {"dto_step": kernels}}
    machine = {"gpu": {"name": gpu}} if gpu else {}
    return {
        "started": started, "quick": False, "commit": f"of {started}", "machine": machine, "versions": versions,
        "records": records,
    }  # fmt: skip


def table(tmp_path, *runs):
    for i, one in enumerate(runs):
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / f"{i}.json").write_text(json.dumps(one))
    return fastest.table(tmp_path)


def test_the_shipped_table_is_what_the_results_say():
    assert json.loads(fastest.OUTPUT.read_text()) == fastest.table()
    assert fastest.OUTPUT.read_text() == json.dumps(fastest.table(), indent=2) + "\n"
    assert Path(measured.__file__).with_name("measured.json") == fastest.OUTPUT


def test_the_geometric_mean_over_models_decides(tmp_path):
    times = {"A": {"cuda": 9.0, "triton": 8.0, "eager": 1.0}, "B": {"cuda": 2.0, "triton": 3.0}}
    found = table(tmp_path, run("1", times), run("1", {"A": {"triton": 1.0}}, gpu="GPU B"), run("1", times, gpu=None))
    assert found == {
        "GPU A": {
            "dto_step, one latents row": {
                "fastest": "cuda",
                "milliseconds": {"cuda": {"A": 9.0, "B": 2.0}, "triton": {"A": 8.0, "B": 3.0}},
                "kernels": {"cuda": 1, "triton": 1},
                "commit": "of 1",
            }
        }
    }


def test_the_latest_result_counts_and_has_the_numbers_of_its_kernels(tmp_path):
    new = run("2", {"A": {"cuda": 2.0, "triton": 1.0}}, kernels={"cuda": 3, "triton": 4})
    found = table(tmp_path, new, run("1", {"A": {"cuda": 1.0, "triton": 2.0}}))
    (entry,) = found["GPU A"].values()
    assert (entry["fastest"], entry["kernels"], entry["commit"]) == ("triton", {"cuda": 3, "triton": 4}, "of 2")


def test_results_of_kernels_that_have_changed_decide_nothing(monkeypatch):
    entry = {"kernels": {"cuda": 1, "triton": 2}}
    monkeypatch.setattr(measured, "KERNELS", {"dto_step": {"cuda": 1, "triton": 2}})
    assert measured.why_not_used("dto_step, one latents row", entry) is None
    monkeypatch.setattr(measured, "KERNELS", {"dto_step": {"cuda": 1, "triton": 3}})
    assert measured.why_not_used("dto_step, one latents row", entry) == "triton changed since"
