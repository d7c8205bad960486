"""Tests in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

lesser_instruction_sets = pytest.mark.parametrize("capability", ["default", "avx2"])


def run_python(*arguments: str, **environment: str) -> str:
    """What Python prints, which must end well."""
    result = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
