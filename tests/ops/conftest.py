"""The fixture `backend`: a back end made ready, as the tests' decorator `by` names it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from back_ends import INTERPRETED

from nabla_fast.ops import native
from nabla_fast.testing.operators import Backend

# Tests of Triton's kernels alone: there is no process here that can run them, but the one of test_triton.py.
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_triton_kernels.py", "test_triton_decode.py"]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Operators by one back end, without autograd: ``backend.relaxed_stats(z)``."""
    name, _, on_gpu = request.param.partition("-")
    if name == "native" and not native.available():
        pytest.skip(f"no native library: {native.why_missing()}")
    if name == "cuda" and not on_gpu:
        from cuda_cases import emulate

        emulate(monkeypatch)
    threads = torch.get_num_threads()
    # Kernels that divide their work among threads are to do so; tiny tensors of PyTorch gain nothing from threads.
    torch.set_num_threads(2 if name == "native" else 1)
    torch.set_default_device("cuda" if on_gpu else None)
    yield Backend(name)
    torch.set_default_device(None)
    torch.set_num_threads(threads)
