"""Compiles every CUDA file for GPUs that are not there, and fails where a kernel spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")

# One entry of what `ptxas -v` says.
KERNEL = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", re.DOTALL)


def test_there_are_sources() -> None:
    assert [source.stem for source in SOURCES] == ["dto_step_latents", "dto_step_logits", "token_diff"]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH, so the CUDA kernels cannot be compiled")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    result = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = KERNEL.findall(result.stderr)
    assert kernels, result.stderr
    for name, stack, spilled in kernels:
        assert (int(stack), int(spilled)) == (0, 0), f"{name} on {architecture}: {stack} bytes of stack"
