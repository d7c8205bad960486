"""Writes nabla_fast/ops/measured.json: which back end was the fastest, by GPU and case, from the results here.

    python benchmarks/fastest.py

Of several results of one GPU and case, the latest counts. A back end's time in a case is the geometric mean over the
models that it was measured with: one of them would decide by its sizes alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OUTPUT = Path(__file__).parents[1] / "nabla_fast" / "ops" / "measured.json"
BACKENDS = ("cuda", "triton")


def table(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """See `nabla_fast.ops.measured.table`."""
    found: dict[str, dict[str, Any]] = {}
    runs = [json.loads(path.read_text()) for path in results.glob("*/*.json")]
    runs = [run for run in runs if isinstance(run, dict) and run.get("machine", {}).get("gpu") and not run["quick"]]
    for run in sorted(runs, key=lambda run: run["started"]):
        numbers = run["versions"].get("kernels", {})
        for case, times in _cases(run["records"]).items():
            means = {name: math.exp(sum(map(math.log, by.values())) / len(by)) for name, by in times.items()}
            found.setdefault(run["machine"]["gpu"]["name"], {})[case] = {
                "fastest": min(means, key=lambda name: means[name]),
                "milliseconds": times,
                "kernels": {name: numbers.get(case.partition(",")[0], {}).get(name, 1) for name in times},
                "commit": run["commit"],
            }
    return {gpu: dict(sorted(cases.items())) for gpu, cases in sorted(found.items())}


def _cases(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Case → back end → model → milliseconds, where a case has more than one back end."""
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        times = {name: one["median_ms"] for name, one in record["contenders"].items() if name in BACKENDS}
        if record["suite"] == "operators" and len(times) > 1:
            for name in BACKENDS:
                cases.setdefault(record["name"], {}).setdefault(name, {})[record["model"]] = round(times[name], 4)
    return cases


def main() -> None:
    OUTPUT.write_text(json.dumps(table(), indent=2) + "\n")
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
