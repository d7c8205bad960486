"""Tests in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

lesser_instruction_sets = pytest.mark.parametrize("capability", ["default", "avx2"])


def run_python(*arguments: str, **environment: str) -> str:
    """What Python prints, which must end well."""
    result = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def repeat_tests(file: str, some: str, capability: str) -> None:
    """Runs tests of ``file`` where torch, and so the library, leaves instruction sets above ``capability`` alone.

    Args:
        some: which tests, as pytest's ``-k`` takes it.
    """
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("runs at one capability already")
    if torch.backends.cpu.get_cpu_capability() == capability.upper():
        pytest.skip("the other tests ran on it")
    run_python(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", some), ATEN_CPU_CAPABILITY=capability
    )
