"""Every Triton kernel compiles for sm_80, sm_90, sm_100 and sm_120 as it would be launched, and spills no register.

No GPU is needed: `triton_resources.py` records the launches of all operators at real sizes, compiles them, and reads
registers, stack (where spills go) and shared memory from the cubin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_resources.py")
# Shared memory that one block may use, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
KERNELS = {
    "decide", "gather", "likelihood", "linear_stats", "logits_update", "mean", "mixture", "one_row", "others",
    "relaxed", "rotary", "row_state", "row_stats", "scan_norm", "tile_norm", "token_diff", "update", "weights",
}  # fmt: skip


def _compile(architecture: int) -> list[dict[str, Any]]:
    """Two processes, half of the kernels each; what was compiled before comes from Triton's own cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(architecture), str(shard), "2"],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for shard in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(line) for output in outputs for line in output.splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", sorted(SHARED))
def test_compiles_without_spills(architecture: int) -> None:
    lines = sorted(_compile(architecture), key=lambda line: line["kernel"])
    failed = [line for line in lines if "error" in line]
    print(f"sm_{architecture}: warps, registers, shared bytes, stack bytes")  # pytest -s or -rP shows it
    for line in lines:
        if "error" not in line:
            numbers = "{warps:3d} {registers:4d} {shared:7d} {stack:4d}".format(**line)
            print(f"  {line['kernel']:62s}{numbers}")
    assert not failed
    assert {line["kernel"].split()[0] for line in lines} == KERNELS
    assert not [line for line in lines if line["stack"] > 0], "registers spill"
    assert not [line for line in lines if line["shared"] > SHARED[architecture]], "too much shared memory"
