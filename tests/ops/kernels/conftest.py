"""Tests of Triton kernels, on a GPU or in the interpreter, where `tests/ops/test_triton.py` runs each file.

Triton reads TRITON_INTERPRET when a kernel is decorated, for the whole process, and inductor decorates kernels too; so
where the variable is not set, these files are collected only if there is a GPU, and then all tensors are on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    torch.set_num_threads(1)
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    if INTERPRETED:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
