"""Compiles every CUDA file for GPUs that are not there, and fails where a kernel spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
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


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH, so the CUDA kernels cannot be compiled")
def test_instructions_of_an_entry_in_a_step_of_logits(tmp_path: Path) -> None:
    """One exponential, one root and one reciprocal in about 41 instructions, where the registers hold the entries.

    Entries are unrolled: from one's exponential to the next one's are the instructions of an entry.
    """
    triton = pytest.importorskip("triton")
    assert NVCC is not None
    source, cubin = next(source for source in SOURCES if source.stem == "dto_step_logits"), tmp_path / "kernels.cubin"
    subprocess.run([NVCC, "-std=c++17", "-O3", "-cubin", "-arch=sm_90", str(source), "-o", str(cubin)], check=True)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    (kernel,) = (part for part in text.split("Function : ") if "dto_logits_kernelILi4E" in part.split("\n", 1)[0])
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", kernel)
    places = [i for i, what in enumerate(instructions) if "MUFU.EX2" in what]
    steps = [instructions[a:b] for a, b in pairwise(places)]
    steps = [
        one for one in steps if sum("MUFU" in what for what in one) == 3 and any("MUFU.SQRT" in what for what in one)
    ]
    assert len(steps) >= 6  # of four entries, with weight decay and without
    lengths = sorted(map(len, steps))
    assert lengths[len(lengths) // 2] <= 45, lengths
