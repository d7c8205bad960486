"""Tests of Triton kernels in the interpreter. `tests/test_triton.py` runs each file in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is decorated, for the whole process, and inductor decorates kernels too; so
these files are not collected where the variable is not set.
"""

from __future__ import annotations

import os

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    torch.set_num_threads(1)
else:
    collect_ignore_glob = ["test_*.py"]
