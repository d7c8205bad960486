"""Peak extra memory of one gradient evaluation on SmolLM2, against the published schedule's in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "evaluation_memory.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"),
]


@pytest.mark.timeout(600)
def test_an_evaluation_takes_a_tenth_of_the_published_schedules_memory(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = [sys.executable, str(BENCHMARK), "--output", str(output), "--ahead", "512", "--repeats", "1"]
    subprocess.run(command, check=True, capture_output=True)
    over = json.loads(output.read_text())["ours_over"]
    assert over["nabla_fast"]["published_optimisation"] < 0.5
    assert over["nabla_fast_checkpointed"]["published_optimisation"] < 0.1
