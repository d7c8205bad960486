"""The Triton kernels in the interpreter: each file of `tests/ops/kernels` in a process with TRITON_INTERPRET=1.

Processes of their own, because Triton reads the variable once for all kernels of a process, inductor's included. Where
there is a GPU, pytest finds the files by itself as well and runs them there.
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

FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))


def _run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All files, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {file.name: pool.submit(_run, file) for file in FILES}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [file.name for file in FILES])
def test_in_the_interpreter(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    run = runs[name].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_there_are_files() -> None:
    assert len(FILES) == 5


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
