"""Triton in its interpreter: the tests by back end "triton" of all files here, with TRITON_INTERPRET=1.

In processes of their own, because Triton reads the variable once for all kernels of a process, inductor's included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = {
    "steps": ["test_dto_step.py", "test_dto_step_rows.py"],
    "decodes": ["test_triton_decode.py", "test_triton_kernels.py"],
    "all others": [
        "test_arguments.py", "test_embedding.py", "test_gradient_norm.py", "test_likelihood.py", "test_rotary.py",
        "test_stats.py", "test_token_diff.py",
    ],
}  # fmt: skip
# Names Triton, but runs none of its kernels.
OTHERS = {
    "test_triton.py", "test_triton_compile.py", "test_triton_launch.py",
    "test_backends.py", "test_cuda.py", "test_cuda_compile.py", "test_operators.py",
}  # fmt: skip


def _run(files: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    command += ["--durations=5", "-k", "triton", *(str(HERE / file) for file in files)]
    # Not as one of the workers that this process may be one of.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of them, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_run, files) for name, files in FILES.items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    run = runs[name].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
    print(run.stdout)  # pytest -s or -rP shows how long they took


def test_all_files_with_tests_by_triton_are_run() -> None:
    by_triton = {file.name for file in HERE.glob("test_*.py") if '"triton"' in file.read_text()} | {
        file.name for file in HERE.glob("test_triton_*.py")
    }
    assert {file for files in FILES.values() for file in files} == by_triton - OTHERS


def test_nabla_fast_does_not_import_triton() -> None:
    code = "import sys, nabla_fast.ops; assert 'nabla_fast.ops.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_the_back_end_is_an_import_error() -> None:
    code = """
import sys
sys.modules["triton"] = None
import nabla_fast.ops
try:
    import nabla_fast.ops.triton
except ImportError:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    code = """
import torch
from nabla_fast.ops import triton
try:
    triton.relaxed_stats(torch.randn(2, 5))
except ValueError as error:
    assert "got a CPU tensor" in str(error)
else:
    raise AssertionError
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
